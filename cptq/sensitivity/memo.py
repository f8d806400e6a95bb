"""Values that several metrics derive from the same thing, made once and paid for by each.

A table's `seconds` are what its metric takes on its own. A metric that finds a value made by
another one is therefore charged the seconds that making it took (`borrowed`), as if it had made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Memo:
    """Results by key; `borrowed` adds up the seconds saved by finding them."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, float]] = {}
        self.borrowed = 0.0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, made by `make` the first time."""
        if key in self._made:
            value, seconds = self._made[key]
            self.borrowed += seconds
            return cast(T, value)
        started, owed = time.perf_counter(), self.borrowed
        made = make()
        self._made[key] = made, time.perf_counter() - started + self.borrowed - owed
        return made
