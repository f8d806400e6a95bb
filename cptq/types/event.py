"""What a run says while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Work under way: `done` of `total` steps of `stage` (total None: not known)."""

    stage: str
    done: int
    total: int | None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a person must not miss; every one ends up in the report.

    kind: "fallback" (another way was taken), "skipped" (left dense), "warning", "info".
    """

    kind: Literal["fallback", "skipped", "warning", "info"]
    subject: str
    message: str


Event = Progress | Notice
Emit = Callable[[Event], None]
