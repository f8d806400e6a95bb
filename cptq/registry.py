"""Names to implementations, loaded when first asked for.

An entry is `"module:attribute"`, so that listing names (for `--help` and for "did you mean")
imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar, cast

from cptq.errors import UnknownNameError

T = TypeVar("T")


def find_closest(name: str, names: list[str]) -> str | None:
    """The most similar of `names`, or None when nothing is near."""
    matches = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """A fixed, ordered table of named implementations of one kind.

    Args:
        kind: what an entry is, in the singular ("metric"); used in error messages.
        entries: name -> "module:attribute".
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def check(self, name: str) -> str:
        """`name` if it is registered.

        Raises:
            UnknownNameError: it is not; the message lists the names and the nearest one.
        """
        if name not in self._entries:
            near = find_closest(name, self.names())
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}",
                allowed=", ".join(self._entries),
                hint=f"did you mean {near!r}?" if near else None,
            )
        return name

    def get(self, name: str) -> T:
        """Import and return the implementation called `name`.

        Raises:
            UnknownNameError: as `check`.
        """
        module, _, attribute = self._entries[self.check(name)].partition(":")
        return cast(T, getattr(import_module(module), attribute))
