"""Text in rows: what HTML, Markdown and the terminal all show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text in rows. `right` names the right-aligned columns; a `folded` table is detail."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    note: str = ""
    folded: bool = False


def pairs(title: str, rows: Iterable[tuple[str, Any]], *, folded: bool = False) -> Table:
    """A table of names and values; a value of None or "" leaves its row out."""
    kept = tuple((name, str(value)) for name, value in rows if value not in (None, ""))
    return Table(title=title, columns=("", "value"), rows=kept, folded=folded)
