"""Text for people: tables of cells, numbers, bytes, times and short names.

HTML, Markdown and the terminal all show these tables. Byte counts are decimal (1 MB = 1,000,000
bytes), as disk sizes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

_FILE_TASK = "text:"
_BYTE_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_COUNT_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text cells.

    `right` names the right-aligned columns. The HTML page shows `leading` tables above the figures
    and hides `folded` ones until they are opened.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    note: str = ""
    folded: bool = False
    leading: bool = False


def tabulate_pairs(
    title: str, rows: Iterable[tuple[str, Any]], *, folded: bool = False, leading: bool = False
) -> Table:
    """Build a table of names and values; rows with a value of None or "" are omitted."""
    kept = tuple((name, str(value)) for name, value in rows if value not in (None, ""))
    return Table(title=title, columns=("", "value"), rows=kept, folded=folded, leading=leading)


def format_bytes(nbytes: int) -> str:
    """Return a rounded size: `84.2 MB`."""
    for step, unit in _BYTE_UNITS:
        if nbytes >= step:
            return f"{nbytes / step:.4g} {unit}"
    return f"{nbytes} B"


def format_bytes_exact(nbytes: int) -> str:
    """Return a size with all digits: `84.2 MB (84,213,456 bytes)`."""
    return f"{format_bytes(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"


def format_count(count: int) -> str:
    """Return a rounded count, for example of parameters: `134.5 M`."""
    for step, unit in _COUNT_UNITS:
        if count >= step:
            return f"{count / step:.4g} {unit}"
    return str(count)


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a measured number with `digits` significant digits; a dash for None."""
    if value is None:
        return "-"
    if not isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def format_signed(value: float | None, digits: int = 4) -> str:
    """Return a number as `format_number` does, with its sign."""
    if value is None:
        return "-"
    return ("+" if value > 0 else "") + format_number(value, digits)


def format_with_error(value: float, stderr: float | None) -> str:
    """Return a number and its standard error, if known: `0.8601 ± 0.012`."""
    error = f" ± {format_number(stderr, 2)}" if stderr is not None else ""
    return format_number(value) + error


def format_p_value(value: float) -> str:
    """Return a p-value; below one thousandth only the bound."""
    return "<0.001" if value < 0.001 else format_number(value, 2)


def format_seconds(value: float) -> str:
    """Return a duration: `0.42 s`, `12 s`, `3 min 05 s`, `2 h 04 min`."""
    if value < 10:
        return f"{value:.2g} s" if value >= 0.01 else "0 s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_percent(share: float) -> str:
    """Return a share as a percentage: `31.3%`."""
    return f"{100 * share:.3g}%"


def format_plural(amount: int, noun: str) -> str:
    """Return an amount and its noun: `1 layer`, `2 layers`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def shorten_names(sources: Sequence[str]) -> list[str]:
    """Return the shortest path suffixes that keep the names distinct.

    `.json` is dropped unless that makes two of the names equal.
    """
    bare = [source.removesuffix(".json").rstrip("/") for source in sources]
    paths = [path.split("/") for path in (bare if len(set(bare)) == len(bare) else sources)]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path[-1]} ({index})" for index, path in enumerate(paths, start=1)]


def shorten_tasks(names: Iterable[str]) -> Mapping[str, str]:
    """Map each task to its name in tables: a task `text:PATH` to the name of its file."""
    distinct = list(dict.fromkeys(names))
    paths = [name.removeprefix(_FILE_TASK) for name in distinct if name.startswith(_FILE_TASK)]
    short = dict(zip(paths, shorten_names(paths), strict=True)) if paths else {}
    return {
        name: short[name.removeprefix(_FILE_TASK)] if name.startswith(_FILE_TASK) else name
        for name in distinct
    }
