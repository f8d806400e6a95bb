"""Where the error accumulates: the hidden state of the compressed model after every block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cptq.report.formatting import Table, format_number
from cptq.report.plots import Mark, draw_dots
from cptq.report.summary import Summary
from cptq.report.svg import Figure

EMBEDDING = "embedding"


def name_depth(summary: Summary) -> list[tuple[str, int | None, float]]:
    """Return (place, block, error) from the embedding to the last block; none if not measured."""
    errors = summary.quality.depth if summary.quality else ()
    return [
        (EMBEDDING if index == 0 else f"block {index - 1}", index - 1 if index else None, error)
        for index, error in enumerate(errors)
    ]


def draw_depth(summary: Summary, ident: str = "depth") -> Figure | None:
    """Draw the error after every block; None where it was not measured."""
    marks = [
        Mark(
            name=name,
            block=block,
            value=error,
            css="r0",
            tip=f"after {name}: {format_number(error, 3)}",
            series="error",
        )
        for name, block, error in name_depth(summary)
    ]
    if not marks:
        return None
    title = "Where the error accumulates"
    svg, remarks = draw_dots(marks, ident, title, "share of the squared norm")
    last = marks[-1]
    words = [
        "|h' - h|² / |h|² of the hidden state after each block, with the error of all blocks "
        "before it, on text that did not calibrate",
        f"{format_number(last.value, 3)} after {last.name}",
        *_name_step(marks),
        *remarks,
    ]
    return Figure(ident=ident, title=title, caption="; ".join(words), svg=svg)


def _name_step(marks: Sequence[Mark]) -> list[str]:
    """Return which block adds most; nothing where the error grows nowhere."""
    steps = [(b.value - a.value, b.name) for a, b in pairwise(marks)]
    step, name = max(steps, default=(0.0, ""))
    return [f"it grows most in {name}, by {format_number(step, 3)}"] if step > 0 else []


def build_accumulation_table(summary: Summary) -> Table | None:
    """Build the table of the same numbers; None where they were not measured."""
    rows = tuple((name, format_number(error, 3)) for name, _, error in name_depth(summary))
    columns = ("after", "error of the hidden state")
    if not rows:
        return None
    return Table(
        title="Error after every block", columns=columns, rows=rows, right=columns[1:], folded=True
    )
