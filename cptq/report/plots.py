"""Figures over the layers of a model: one mark per layer in forward order, blocks set apart.

Each is a `Figure`: an SVG with its own title and description for screen readers, a tooltip per
mark, and a legend that the page lays out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from cptq.report.formatting import format_number, format_plural
from cptq.report.summary import Summary
from cptq.report.svg import Figure, Scale, choose_scale, draw_levels, escape_text, tag, wrap_svg
from cptq.types import SensitivityTable, Unit

WIDTH, HEIGHT = 960.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 8.0, 14.0, 30.0
#: room between blocks, in widths of one mark
GAP = 0.8
#: marks of more roles than this share the last colour
MAX_ROLES = 8
LABEL_PIXELS = 30.0
#: name below what belongs to no block, and the room that it takes
OUTSIDE, OUTSIDE_PIXELS = "outside", 44.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One value of a layer, with its block, colour class, tooltip and series."""

    name: str
    block: int | None
    value: float
    css: str
    tip: str
    series: str = ""


class Columns:
    """Horizontal pixels of the marks: even steps with a gap between blocks."""

    def __init__(self, blocks: Sequence[int | None]) -> None:
        self.blocks = blocks
        offsets: list[float] = []
        at = 0.0
        for index, block in enumerate(blocks):
            at += GAP if index and block != blocks[index - 1] else 0.0
            offsets.append(at)
            at += 1.0
        self.step = (WIDTH - LEFT - RIGHT) / max(at, 1.0)
        self.centers = [LEFT + (offset + 0.5) * self.step for offset in offsets]

    def iterate_spans(self) -> Iterator[tuple[int | None, float, float]]:
        """Yield (block, left, right) for each run of marks of one block."""
        first = 0
        for index in range(1, len(self.blocks) + 1):
            if index == len(self.blocks) or self.blocks[index] != self.blocks[first]:
                half = self.step * (1 + GAP) / 2
                yield self.blocks[first], self.centers[first] - half, self.centers[index - 1] + half
                first = index


def draw_figures(summary: Summary) -> list[Figure]:
    """Draw all figures that the summary has numbers for."""
    figures: list[Figure | None] = []
    for index, table in enumerate(summary.sensitivity.values()):
        figures.append(draw_sensitivity(table, summary.units, f"sensitivity-{index}"))
    figures.append(draw_errors(summary))
    return [figure for figure in figures if figure is not None]


def assign_role_classes(roles: Sequence[str]) -> dict[str, str]:
    """Map roles to css classes in order of appearance; all beyond `MAX_ROLES` share the last."""
    distinct = list(dict.fromkeys(roles))
    return {role: f"r{min(index, MAX_ROLES - 1)}" for index, role in enumerate(distinct)}


def _build_legend(classes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    shared = [role for role, css in classes.items() if css == f"r{MAX_ROLES - 1}"]
    own = [(css, role) for role, css in classes.items() if role not in shared]
    if len(shared) > 1:
        return (*own, (f"r{MAX_ROLES - 1}", f"{len(shared)} other roles"))
    return (*own, *((f"r{MAX_ROLES - 1}", role) for role in shared))


def draw_sensitivity(table: SensitivityTable, units: Sequence[Unit], ident: str) -> Figure:
    """Draw one dot per unit, its score; a line joins the units of each role."""
    shown = [unit for unit in units if unit.name in table.per_unit]
    classes = assign_role_classes([unit.role for unit in shown])
    marks = [
        Mark(
            name=unit.name,
            block=unit.block,
            value=table.per_unit[unit.name],
            css=classes[unit.role],
            tip=f"{unit.name} ({unit.role}): {format_number(table.per_unit[unit.name])}",
            series=unit.role,
        )
        for unit in shown
    ]
    title = f"Sensitivity by {table.metric}"
    svg, remarks = draw_dots(marks, ident, title, table.score_unit)
    return Figure(
        ident=ident,
        title=title,
        caption="; ".join(
            [f"Higher: more sensitive to compression. Unit: {table.score_unit}", *remarks]
        ),
        svg=svg,
        legend=_build_legend(classes),
    )


def draw_errors(summary: Summary, ident: str = "errors") -> Figure | None:
    """Draw relative output and weight error of each compressed layer; None with fewer than two."""
    specs = {layer.name: layer for layer in summary.layers}
    kinds = (("output error", "e0"), ("weight error", "e1"))
    marks = [
        Mark(
            name=row.name,
            block=specs[row.name].block if row.name in specs else None,
            value=value,
            css=css,
            tip=f"{row.name} ({row.candidate.label}): {kind} {format_number(value)}",
            series=kind,
        )
        for row in summary.results
        for (kind, css), value in zip(kinds, (row.output_error, row.weight_error), strict=True)
        if value is not None
    ]
    if len({mark.name for mark in marks}) < 2:
        return None  # one dot shows nothing that the table of layers does not say
    title = "Error per layer"
    svg, remarks = draw_dots(marks, ident, title, "share of the squared norm", joined=False)
    held_out = any(row.held_out for row in summary.results)
    inputs = "inputs that did not calibrate" if held_out else "the calibration inputs"
    caption = f"Output error: E|x(W-Q)|² / E|xW|² on {inputs}; weight error: |W-Q|² / |W|²"
    legend = tuple((css, kind) for kind, css in kinds if any(m.css == css for m in marks))
    return Figure(
        ident=ident, title=title, caption="; ".join([caption, *remarks]), svg=svg, legend=legend
    )


def draw_dots(
    marks: Sequence[Mark], ident: str, title: str, unit: str, *, joined: bool = True
) -> tuple[str, list[str]]:
    """Return the drawing and remarks about its axis.

    Marks of the same name share a column. Values that are not finite are omitted; on a log axis
    zero and negative values are hollow dots on the bottom line. Remarks mention both.
    """
    names = list(dict.fromkeys(mark.name for mark in marks))
    first = {mark.name: mark for mark in reversed(marks)}
    columns = Columns([first[name].block for name in names])
    at = dict(zip(names, columns.centers, strict=True))
    drawn = [mark for mark in marks if isfinite(mark.value)]
    scale = choose_scale([mark.value for mark in drawn], top=TOP, bottom=HEIGHT - BOTTOM)
    radius = min(3.6, max(2.0, columns.step * 0.42))
    body = _draw_bands(columns) + draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    if joined:
        body += "".join(_draw_lines(drawn, at, scale))
    body += "".join(_draw_dot(mark, at[mark.name], scale, radius) for mark in drawn)
    remarks = _list_remarks(marks, drawn, scale)
    description = (
        f"{format_plural(len(names), 'layer')} in forward order; {unit}; "
        f"{_describe_range(drawn, remarks)}"
    )
    return wrap_svg(body, ident, title, description, (WIDTH, HEIGHT)), remarks


def _draw_dot(mark: Mark, x: float, scale: Scale, radius: float) -> str:
    hollow = " hollow" if scale.log and mark.value <= 0 else ""
    tip = tag("title", escape_text(mark.tip))
    return tag(
        "circle", tip, class_=f"dot {mark.css}{hollow}", cx=x, cy=scale.locate(mark.value), r=radius
    )


def _draw_lines(marks: Sequence[Mark], at: Mapping[str, float], scale: Scale) -> Iterator[str]:
    for series in dict.fromkeys(mark.series for mark in marks):
        own = [mark for mark in marks if mark.series == series]
        points = " ".join(f"{at[mark.name]:.1f},{scale.locate(mark.value):.1f}" for mark in own)
        yield tag("polyline", class_=f"line {own[0].css}", points=points)


def _list_remarks(marks: Sequence[Mark], drawn: Sequence[Mark], scale: Scale) -> list[str]:
    lost, low = len(marks) - len(drawn), sum(mark.value <= 0 for mark in drawn)
    remarks = ["log scale"] if scale.log else []
    if lost:
        remarks.append(f"{format_plural(lost, 'value')} not finite, not drawn")
    if scale.log and low:
        remarks.append(f"{format_plural(low, 'value')} of zero or below, hollow on the bottom line")
    return remarks


def _describe_range(marks: Sequence[Mark], remarks: Sequence[str]) -> str:
    if not marks:
        return "nothing to draw"
    low, high = min(marks, key=lambda m: m.value), max(marks, key=lambda m: m.value)
    lowest = f"lowest {low.name} {format_number(low.value)}"
    highest = f"highest {high.name} {format_number(high.value)}"
    return "; ".join([f"{lowest}, {highest}", *remarks])


def _draw_bands(columns: Columns) -> str:
    """Draw a faint background behind every other block, and block numbers below.

    What belongs to no block, such as the embedding, is named where its name has room.
    """
    drawing, free = "", LEFT
    bottom = HEIGHT - BOTTOM
    for index, (block, left, right) in enumerate(columns.iterate_spans()):
        if index % 2:
            drawing += tag(
                "rect", class_="band", x=left, y=TOP, width=right - left, height=bottom - TOP
            )
        middle = (left + right) / 2
        if block is not None and middle >= free:
            drawing += tag(
                "text", str(block), class_="tick", x=middle, y=bottom + 14, text_anchor="middle"
            )
            free = middle + LABEL_PIXELS
        elif block is None and right - left >= OUTSIDE_PIXELS:
            drawing += tag(
                "text", OUTSIDE, class_="tick", x=middle, y=bottom + 14, text_anchor="middle"
            )
    label = tag("text", "block", class_="tick", x=LEFT - 8, y=bottom + 14, text_anchor="end")
    return drawing + label
