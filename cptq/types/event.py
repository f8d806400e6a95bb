"""Events of a run: progress and notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress: `done` of `total` steps of `stage` are complete (total None: unknown)."""

    stage: str
    done: int
    total: int | None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A message that the user must see; the report lists all of them.

    kind: "fallback" (another method was used), "skipped" (left dense), "warning", "info".
    """

    kind: Literal["fallback", "skipped", "warning", "info"]
    subject: str
    message: str


Event = Progress | Notice
Emit = Callable[[Event], None]
