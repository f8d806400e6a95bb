"""Names as short as they can be told apart, for tables of 80 columns; JSON keeps them whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_FILE = "text:"


def short_names(sources: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell the models apart.

    Without `.json`, unless a model and its own results stand side by side.
    """
    bare = [source.removesuffix(".json").rstrip("/") for source in sources]
    paths = [path.split("/") for path in (bare if len(set(bare)) == len(bare) else sources)]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path[-1]} ({index})" for index, path in enumerate(paths, start=1)]


def short_tasks(names: Iterable[str]) -> Mapping[str, str]:
    """Task -> its name in a table: of a file's task `text:PATH` the file's name."""
    every = list(dict.fromkeys(names))
    files = [name.removeprefix(_FILE) for name in every if name.startswith(_FILE)]
    ends = dict(zip(files, short_names(files), strict=True)) if files else {}
    return {
        name: ends[name.removeprefix(_FILE)] if name.startswith(_FILE) else name for name in every
    }
