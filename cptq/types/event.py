"""Events of a run: progress, notices and pieces of a generated text."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """The next piece of a text that a model writes."""

    text: str


Event = Progress | Notice | Fragment
Emit = Callable[[Event], None]
