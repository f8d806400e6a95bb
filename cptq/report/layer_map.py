"""The map of a plan: a cell per block and role, with its bits in it and coloured by them.

A cell says more when it is pointed at or reached by the keyboard: its unit, how it is stored, its
score, bytes and error. Bits are numbers in the cells, so colour repeats them. Several units of one
role in a block (experts) share a cell, with their range of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cptq.report.formatting import format_bytes, format_number, format_plural
from cptq.report.summary import Summary
from cptq.report.svg import Figure, escape_text, tag, wrap_svg
from cptq.types import Candidate, Unit

#: blocks beside each other; more go on below
BLOCKS = 32
WIDTH, LEFT, CELL, HEAD, HINT = 960.0, 110.0, 24.0, 18.0, 26.0
#: widest cell
WIDEST = 54.0
OUTER = "outside the blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The units of one role in one block, with their candidates and what is said of them."""

    bits: tuple[int, ...]
    sparse: bool
    words: str

    @property
    def text(self) -> str:
        """The bits, or their range; an asterisk for sparse units."""
        low, high = min(self.bits), max(self.bits)
        span = str(low) if low == high else f"{low}-{high}"
        return span + ("*" if self.sparse else "")


def draw_map(summary: Summary, ident: str = "map") -> Figure | None:
    """Draw the map; None without a plan."""
    plan = summary.plan
    units = [unit for unit in summary.units if plan and unit.name in plan.choices]
    if plan is None or not units:
        return None
    inner = [unit for unit in units if unit.block is not None]
    outer = [unit for unit in units if unit.block is None]
    roles = list(dict.fromkeys(unit.role for unit in inner))
    blocks = sorted({unit.block for unit in inner if unit.block is not None})
    rows = [blocks[at : at + BLOCKS] for at in range(0, len(blocks), BLOCKS)]
    step = min(WIDEST, (WIDTH - LEFT) / max(1, min(len(blocks), BLOCKS)))
    foot = len(rows) * (HEAD + CELL * len(roles) + 8) + (CELL + 8 if outer else 0)
    body = ""
    for index, row in enumerate(rows):
        top = index * (HEAD + CELL * len(roles) + 8)
        body += _draw_band(summary, inner, row, roles, (top, step, foot))
    if outer:
        body += _draw_outer(summary, outer, foot)
    used = sorted({choice.bits for name, choice in plan.choices.items()})
    title = "Bits of every layer"
    return Figure(
        ident=ident,
        title=title,
        caption=_caption(units, [plan.choices[unit.name] for unit in units]),
        svg=wrap_svg(
            body, ident, title, _describe(units, summary), (WIDTH, foot + HINT), group=True
        ),
        legend=tuple((f"b{b}", f"{b} bits" + (" (dense)" if b == 16 else "")) for b in used),
    )


def _caption(units: Sequence[Unit], choices: Sequence[Candidate]) -> str:
    words = (
        f"{format_plural(len(units), 'unit')}; columns are blocks, rows are roles. Point at a "
        "cell, or reach it with the Tab key, for its score, bytes and error"
    )
    return words + ("; * sparse" if any(choice.sparsity for choice in choices) else "")


def _describe(units: Sequence[Unit], summary: Summary) -> str:
    assert summary.plan is not None
    counts: dict[str, int] = {}
    for unit in units:
        label = summary.plan.choices[unit.name].label
        counts[label] = counts.get(label, 0) + 1
    parts = ", ".join(f"{format_plural(counts[label], 'unit')} {label}" for label in sorted(counts))
    return f"{parts}; all numbers are in the table All layers"


def _draw_band(
    summary: Summary,
    units: Sequence[Unit],
    blocks: Sequence[int],
    roles: Sequence[str],
    place: tuple[float, float, float],
) -> str:
    top, step, foot = place
    drawing = tag("text", "block", class_="tick", x=LEFT - 8, y=top + 12, text_anchor="end")
    for column, block in enumerate(blocks):
        x = LEFT + (column + 0.5) * step
        drawing += tag("text", str(block), class_="tick", x=x, y=top + 12, text_anchor="middle")
    for row, role in enumerate(roles):
        y = top + HEAD + row * CELL
        drawing += tag(
            "text", escape_text(role), class_="tick", x=LEFT - 8, y=y + 16, text_anchor="end"
        )
        for column, block in enumerate(blocks):
            own = [unit for unit in units if unit.block == block and unit.role == role]
            if own:
                cell = make_cell(summary, own)
                drawing += _draw_cell(cell, LEFT + column * step, y, step, foot)
    return drawing


def _draw_outer(summary: Summary, units: Sequence[Unit], foot: float) -> str:
    y = foot - CELL - 4
    drawing = tag("text", OUTER, class_="tick", x=LEFT - 8, y=y + 16, text_anchor="end")
    for index, unit in enumerate(units):
        x = LEFT + index * 200
        drawing += _draw_cell(make_cell(summary, [unit]), x, y, WIDEST, foot)
        drawing += tag("text", escape_text(unit.role), class_="tick", x=x + WIDEST + 6, y=y + 16)
    return drawing


def make_cell(summary: Summary, units: Sequence[Unit]) -> Cell:
    """Return the cell of units that share a block and a role."""
    assert summary.plan is not None
    choices = [summary.plan.choices[unit.name] for unit in units]
    return Cell(
        bits=tuple(choice.bits for choice in choices),
        sparse=any(choice.sparsity for choice in choices),
        words=_tell(summary, units, choices),
    )


def _tell(summary: Summary, units: Sequence[Unit], choices: Sequence[Candidate]) -> str:
    """Return what is known of the units of a cell, in one line."""
    assert summary.plan is not None
    names = {layer.name for unit in units for layer in unit.layers}
    results = [row for row in summary.results if row.name in names]
    name = units[0].name + (f" and {len(units) - 1} more" if len(units) > 1 else "")
    parts = [f"{name}: {', '.join(sorted({choice.label for choice in choices}))}"]
    table = summary.sensitivity.get(summary.plan.metric or "")
    if table is not None:
        found = [
            table.scores.get(unit.name, {}).get(choice)
            for unit, choice in zip(units, choices, strict=True)
        ]
        known = [score for score in found if score is not None]
        parts += [f"score {format_number(sum(known), 3)}"] if known else []
    if results:
        parts.append(format_bytes(sum(row.nbytes for row in results)))
        errors = [row.output_error for row in results if row.output_error is not None]
        parts += [f"output error {format_number(max(errors), 3)}"] if errors else []
    return "; ".join(parts)


def _draw_cell(cell: Cell, x: float, y: float, step: float, foot: float) -> str:
    words = escape_text(cell.words)
    size = "tiny" if step < 9 * len(cell.text) + 2 else "bits"
    return tag(
        "g",
        tag("title", words),
        tag(
            "rect",
            class_=f"square b{max(cell.bits)}",
            x=x + 1,
            y=y + 1,
            width=step - 2,
            height=CELL - 2,
        ),
        tag("text", cell.text, class_=size, x=x + step / 2, y=y + 16, text_anchor="middle"),
        tag("text", words, class_="hint", x=LEFT - 100, y=foot + 18),
        class_="cell",
        tabindex="0",
        role="img",
        aria_label=cell.words,
    )
