"""The drawings of a report: one mark per layer in forward order, blocks set apart.

Each is a `Figure`: an SVG that carries its own title and description for those who cannot see it,
a tooltip per mark, and a legend for the page to lay out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from cptq.report.summary import Summary
from cptq.report.svg import Scale, choose_scale, tag, text, tick_label
from cptq.report.tally import layer_choices, widths
from cptq.report.words import number, plural
from cptq.types import LayerSpec, SensitivityTable, Unit

WIDTH, HEIGHT = 960.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 8.0, 14.0, 30.0
#: room between blocks, in widths of one mark
GAP = 0.8
#: marks of more roles than this share the last colour
MAX_ROLES = 8
LABEL_PIXELS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing with what stands around it; legend entries are (css class, words)."""

    ident: str
    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One value: where it belongs, how it is coloured, what a tooltip says."""

    name: str
    block: int | None
    value: float
    css: str
    tip: str
    series: str = ""


class Columns:
    """Horizontal pixels of the marks: even steps, a gap wherever the block changes."""

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

    def spans(self) -> Iterator[tuple[int | None, float, float]]:
        """(block, left, right) of each run of marks of one block."""
        first = 0
        for index in range(1, len(self.blocks) + 1):
            if index == len(self.blocks) or self.blocks[index] != self.blocks[first]:
                half = self.step * (1 + GAP) / 2
                yield self.blocks[first], self.centers[first] - half, self.centers[index - 1] + half
                first = index


def role_classes(roles: Sequence[str]) -> dict[str, str]:
    """Role -> css class, in order of appearance; all beyond `MAX_ROLES` share the last."""
    distinct = list(dict.fromkeys(roles))
    return {role: f"r{min(index, MAX_ROLES - 1)}" for index, role in enumerate(distinct)}


def _legend(classes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    shared = [role for role, css in classes.items() if css == f"r{MAX_ROLES - 1}"]
    own = [(css, role) for role, css in classes.items() if role not in shared]
    if len(shared) > 1:
        return (*own, (f"r{MAX_ROLES - 1}", f"{len(shared)} other roles"))
    return (*own, *((f"r{MAX_ROLES - 1}", role) for role in shared))


def sensitivity_figure(table: SensitivityTable, units: Sequence[Unit], ident: str) -> Figure:
    """One dot per unit: its own score of the metric, the units of a role joined by a line."""
    shown = [unit for unit in units if unit.name in table.per_unit]
    classes = role_classes([unit.role for unit in shown])
    marks = [
        Mark(
            name=unit.name,
            block=unit.block,
            value=table.per_unit[unit.name],
            css=classes[unit.role],
            tip=f"{unit.name} ({unit.role}): {number(table.per_unit[unit.name])}",
            series=unit.role,
        )
        for unit in shown
    ]
    title = f"Sensitivity by {table.metric}"
    svg, remarks = dots(marks, ident, title, table.score_unit)
    return Figure(
        ident=ident,
        title=title,
        caption="; ".join([f"Higher = worse if compressed. Unit: {table.score_unit}", *remarks]),
        svg=svg,
        legend=_legend(classes),
    )


def error_figure(summary: Summary, ident: str = "errors") -> Figure | None:
    """Relative output and weight error of every compressed layer; None without results."""
    specs = {layer.name: layer for layer in summary.layers}
    kinds = (("output error", "e0"), ("weight error", "e1"))
    marks = [
        Mark(
            name=row.name,
            block=specs[row.name].block if row.name in specs else None,
            value=value,
            css=css,
            tip=f"{row.name} ({row.candidate.label}): {kind} {number(value)}",
            series=kind,
        )
        for row in summary.results
        for (kind, css), value in zip(kinds, (row.output_error, row.weight_error), strict=True)
        if value is not None
    ]
    if not marks:
        return None
    title = "Error per layer"
    svg, remarks = dots(marks, ident, title, "share of the squared norm", joined=False)
    caption = (
        "Output error: E|x(W-Q)|² / E|xW|² on the calibration inputs; weight error: |W-Q|² / |W|²"
    )
    legend = tuple((css, kind) for kind, css in kinds if any(m.css == css for m in marks))
    return Figure(
        ident=ident, title=title, caption="; ".join([caption, *remarks]), svg=svg, legend=legend
    )


def dots(
    marks: Sequence[Mark], ident: str, title: str, unit: str, *, joined: bool = True
) -> tuple[str, list[str]]:
    """The drawing, and what a reader must know about its axis.

    Marks of the same name share a column. What is not finite is left out and said; on a log axis
    zero and below lie on the bottom line, hollow, and that is said too.
    """
    names = list(dict.fromkeys(mark.name for mark in marks))
    first = {mark.name: mark for mark in reversed(marks)}
    columns = Columns([first[name].block for name in names])
    at = dict(zip(names, columns.centers, strict=True))
    drawn = [mark for mark in marks if isfinite(mark.value)]
    scale = choose_scale([mark.value for mark in drawn], top=TOP, bottom=HEIGHT - BOTTOM)
    radius = min(3.6, max(2.0, columns.step * 0.42))
    body = _bands(columns) + _grid(scale)
    if joined:
        body += "".join(_lines(drawn, at, scale))
    body += "".join(_dot(mark, at[mark.name], scale, radius) for mark in drawn)
    remarks = _remarks(marks, drawn, scale)
    described = f"{plural(len(names), 'layer')} in forward order; {unit}; " + _range(drawn, remarks)
    return _frame(body, ident, title, described), remarks


def _dot(mark: Mark, x: float, scale: Scale, radius: float) -> str:
    hollow = " hollow" if scale.log and mark.value <= 0 else ""
    tip = tag("title", text(mark.tip))
    return tag(
        "circle", tip, class_=f"dot {mark.css}{hollow}", cx=x, cy=scale.at(mark.value), r=radius
    )


def _lines(marks: Sequence[Mark], at: Mapping[str, float], scale: Scale) -> Iterator[str]:
    for series in dict.fromkeys(mark.series for mark in marks):
        own = [mark for mark in marks if mark.series == series]
        points = " ".join(f"{at[mark.name]:.1f},{scale.at(mark.value):.1f}" for mark in own)
        yield tag("polyline", class_=f"line {own[0].css}", points=points)


def _remarks(marks: Sequence[Mark], drawn: Sequence[Mark], scale: Scale) -> list[str]:
    lost, low = len(marks) - len(drawn), sum(mark.value <= 0 for mark in drawn)
    remarks = ["log scale"] if scale.log else []
    if lost:
        remarks.append(f"{plural(lost, 'value')} not finite, not drawn")
    if scale.log and low:
        remarks.append(f"{plural(low, 'value')} of zero or below, hollow on the bottom line")
    return remarks


def _range(marks: Sequence[Mark], remarks: Sequence[str]) -> str:
    if not marks:
        return "nothing to draw"
    low, high = min(marks, key=lambda m: m.value), max(marks, key=lambda m: m.value)
    ends = f"lowest {low.name} {number(low.value)}, highest {high.name} {number(high.value)}"
    return "; ".join([ends, *remarks])


def bits_figure(summary: Summary, ident: str = "bits") -> Figure | None:
    """One bar per planned layer, as high and coloured as it has bits; None without a plan."""
    choices = layer_choices(summary)
    specs = {layer.name: layer for unit in summary.units for layer in unit.layers}
    if not choices:
        return None
    columns = Columns([specs[name].block for name in choices])
    high = float(max(choice.bits for choice in choices.values()))
    scale = Scale(low=0.0, high=high, top=TOP, bottom=HEIGHT - BOTTOM)
    used = sorted({choice.bits for choice in choices.values()})
    bars = [
        _bar(specs[name], choice.bits, choice.label, x, columns.step, scale)
        for (name, choice), x in zip(choices.items(), columns.centers, strict=True)
    ]
    body = _bands(columns) + _grid(scale, [0.0, *map(float, used)]) + "".join(bars)
    told = ", ".join(f"{plural(row.layers, 'layer')} {row.label}" for row in widths(summary))
    title = "Bits per layer"
    return Figure(
        ident=ident,
        title=title,
        caption="Linears in forward order. Embeddings and what else stays dense: see the layers",
        svg=_frame(body, ident, title, f"{plural(len(choices), 'layer')} in forward order: {told}"),
        legend=tuple(
            (f"b{bits}", f"{bits} bits" + (" (dense)" if bits == 16 else "")) for bits in used
        ),
    )


def _bar(spec: LayerSpec, bits: int, label: str, x: float, step: float, scale: Scale) -> str:
    top, wide = scale.at(bits), max(step * 0.86, 0.5)
    return tag(
        "rect",
        tag("title", text(f"{spec.name} ({spec.role}): {label}")),
        class_=f"bar b{bits}",
        x=x - wide / 2,
        y=top,
        width=wide,
        height=scale.bottom - top,
    )


def _bands(columns: Columns) -> str:
    """A faint ground under every other block, and the blocks' numbers below."""
    found, free = "", LEFT
    bottom = HEIGHT - BOTTOM
    for index, (block, left, right) in enumerate(columns.spans()):
        if index % 2:
            found += tag(
                "rect", class_="band", x=left, y=TOP, width=right - left, height=bottom - TOP
            )
        middle = (left + right) / 2
        if block is not None and middle >= free:
            found += tag(
                "text", str(block), class_="tick", x=middle, y=bottom + 14, text_anchor="middle"
            )
            free = middle + LABEL_PIXELS
    words = tag("text", "block", class_="tick", x=LEFT - 8, y=bottom + 14, text_anchor="end")
    return found + words


def _grid(scale: Scale, ticks: Sequence[float] | None = None) -> str:
    found = ""
    for value in scale.ticks() if ticks is None else ticks:
        y = scale.at(value)
        found += tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        label = tick_label(value)
        found += tag("text", label, class_="tick", x=LEFT - 8, y=y + 4, text_anchor="end")
    return found


def _frame(body: str, ident: str, title: str, described: str) -> str:
    """The drawing as one image with a name and a description."""
    head = tag("title", text(title), id=f"{ident}-title")
    head += tag("desc", text(described), id=f"{ident}-desc")
    return tag(
        "svg",
        head,
        body,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_="chart",
    )


def figures(summary: Summary) -> list[Figure]:
    """All drawings that the summary has numbers for."""
    found: list[Figure | None] = [bits_figure(summary)]
    for index, table in enumerate(summary.sensitivity.values()):
        found.append(sensitivity_figure(table, summary.units, f"sensitivity-{index}"))
    found.append(error_figure(summary))
    return [figure for figure in found if figure is not None]
