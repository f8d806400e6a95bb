"""Registries: named implementations, imported on first use.

An entry is `"module:attribute"`, so listing names (for `--help` and "did you mean") imports nothing
heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar, cast

from cptq.errors import UnknownNameError

T = TypeVar("T")


def find_closest(name: str, names: list[str]) -> str | None:
    """Return the most similar of `names`, or None if none is similar."""
    matches = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """A fixed, ordered table of named implementations of one kind.

    Args:
        kind: the kind of entry in the singular, such as "metric", for error messages.
        entries: {name: "module:attribute"}.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def list_names(self) -> list[str]:
        """Return all names in registration order."""
        return list(self._entries)

    def check(self, name: str) -> str:
        """Return `name` if it is registered.

        Raises:
            UnknownNameError: it is not; the message lists all names and the most similar one.
        """
        if name not in self._entries:
            near = find_closest(name, self.list_names())
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}",
                allowed=", ".join(self._entries),
                hint=f"did you mean {near!r}?" if near else None,
            )
        return name

    def get(self, name: str) -> T:
        """Import and return the implementation of a name.

        Raises:
            UnknownNameError: as `check`.
        """
        module, _, attribute = self._entries[self.check(name)].partition(":")
        # looked up first: this is called for every product with a packed weight
        return cast(T, getattr(sys.modules.get(module) or import_module(module), attribute))
