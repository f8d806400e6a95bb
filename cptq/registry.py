"""Registries: named implementations, imported on first use.

An entry is `"module:attribute"`, so listing names (for `--help` and "did you mean") imports nothing
heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar, cast

from cptq.errors import UnknownNameError

T = TypeVar("T")


def find_closest(name: str, names: list[str]) -> str | None:
    """Return the most similar of `names`, or None if none is similar."""
    matches = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return matches[0] if matches else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What `cptq methods` says about a name.

    Attributes:
        does: what it is, one line.
        source: the paper or project that it comes from; empty where it is cptq's own.
        cost: what it takes beside what every run does.
        good: what it is good for by our own measurements (docs/), or what it is for.
    """

    does: str
    source: str = ""
    cost: str = ""
    good: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a registry: where it is implemented, and what is known of it."""

    place: str
    facts: Facts


class Registry(Generic[T]):
    """A fixed, ordered table of named implementations of one kind.

    Args:
        kind: the kind of entry in the singular, such as "metric", for error messages.
        entries: {name: "module:attribute"}, or with facts {name: `Entry`}.
    """

    def __init__(self, kind: str, entries: Mapping[str, str | Entry]) -> None:
        self.kind = kind
        self._entries = {n: e.place if isinstance(e, Entry) else e for n, e in entries.items()}
        self._facts = {n: e.facts for n, e in entries.items() if isinstance(e, Entry)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def list_names(self) -> list[str]:
        """Return all names in registration order."""
        return list(self._entries)

    def find_facts(self, name: str) -> Facts | None:
        """Return what is known of a name; None where nothing is written down."""
        return self._facts.get(name)

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
