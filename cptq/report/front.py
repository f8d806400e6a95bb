"""The size-quality front: a dot per model, a whisker for its 95% interval, a line along the front.

Sizes count from zero, so that half the length is half the bytes; quality does not, as its range is
what a reader looks at (a logarithm where it spans decades). The front's line is a staircase: from a
model to the next larger one that is better, nothing in between is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite

from cptq.report.names import short_tasks
from cptq.report.plots import Figure
from cptq.report.side_by_side import ComparedModel, SideBySide
from cptq.report.svg import Scale, choose_scale, linear_step, tag, text, tick_label
from cptq.report.words import number, size

WIDTH, HEIGHT = 960.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 20.0, 20.0, 48.0
NORMAL = 1.96
LINE = 14.0
LETTER = 6.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model where it is drawn; values are bytes and the quality."""

    name: str
    nbytes: int
    value: float
    stderr: float
    front: bool

    @property
    def ends(self) -> tuple[float, float]:
        """The 95% interval."""
        return self.value - NORMAL * self.stderr, self.value + NORMAL * self.stderr

    @property
    def tip(self) -> str:
        """What a tooltip says."""
        error = f" ± {number(self.stderr, 2)}" if self.stderr else ""
        return f"{self.name}: {size(self.nbytes)}, {number(self.value)}{error}"


def points(found: SideBySide) -> list[Point]:
    """The models with a known size and a finite quality, smallest first."""
    drawn = [point for model in found.models if (point := _point(found, model))]
    return sorted(drawn, key=lambda point: (point.nbytes, point.name))


def _point(found: SideBySide, model: ComparedModel) -> Point | None:
    result = found.measured(model)
    if model.weight_bytes is None or result is None or not isfinite(result.value):
        return None
    return Point(
        name=model.name,
        nbytes=model.weight_bytes,
        value=result.value,
        stderr=result.stderr or 0.0,
        front=found.on_front(model),
    )


def value_scale(drawn: Sequence[Point]) -> Scale:
    """A scale around the values and their intervals; logarithmic where they span decades."""
    top, bottom = TOP, HEIGHT - BOTTOM
    values = [point.value for point in drawn]
    wide = choose_scale(values, top=top, bottom=bottom)
    if wide.log:
        return wide
    ends = [end for point in drawn for end in point.ends]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    step = linear_step(low - room, high + room)
    low, high = floor((low - room) / step) * step, ceil((high + room) / step) * step
    return Scale(low=low, high=high, top=top, bottom=bottom)


def front_figure(found: SideBySide) -> Figure | None:
    """The drawing; None where fewer than two models have both numbers."""
    drawn = points(found)
    if len(drawn) < 2:
        return None
    across = choose_scale([p.nbytes / 1e6 for p in drawn], top=WIDTH - RIGHT, bottom=LEFT)
    if across.log:
        across = Scale(low=0.0, high=across.high, top=WIDTH - RIGHT, bottom=LEFT)
    scale = value_scale(drawn)
    task, metric = found.quality
    task = short_tasks([task])[task]
    better = "higher" if found.higher_is_better else "lower"
    title = f"Size and {metric} ({task})"
    body = _grid(scale, across, metric) + _stairs(drawn, scale, across)
    body += "".join(_mark(point, scale, across) for point in drawn) + _names(drawn, scale, across)
    described = "; ".join(point.tip + (" (front)" if point.front else "") for point in drawn)
    log = "; log scale" if scale.log else ""
    return Figure(
        ident="front",
        title=title,
        caption=f"{metric}: {better} is better; whiskers: 95% interval of the value by itself "
        f"(differences on the same samples are surer, see the table){log}",
        svg=_frame(body, title, described),
        legend=(("r0", "on the front"), ("r7", "another is as small and as good")),
    )


def _grid(scale: Scale, across: Scale, metric: str) -> str:
    bottom, found = HEIGHT - BOTTOM, ""
    for value in scale.ticks():
        y = scale.at(value)
        found += tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        label = tick_label(value)
        found += tag("text", label, class_="tick", x=LEFT - 8, y=y + 4, text_anchor="end")
    for value in across.ticks():
        x = across.at(value)
        found += tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom)
        label = tick_label(value)
        found += tag("text", label, class_="tick", x=x, y=bottom + 16, text_anchor="middle")
    middle, end = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8
    words = "weight file, MB"
    found += tag("text", words, class_="tick", x=middle, y=end, text_anchor="middle")
    return found + tag(
        "text", text(metric), class_="tick", x=LEFT - 8, y=TOP - 8, text_anchor="end"
    )


def _x(point: Point, across: Scale) -> float:
    return across.at(point.nbytes / 1e6)


def _stairs(drawn: Sequence[Point], scale: Scale, across: Scale) -> str:
    front = [point for point in drawn if point.front]
    corners: list[tuple[float, float]] = []
    for point in front:
        x, y = _x(point, across), scale.at(point.value)
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return tag("polyline", class_="line r0", points=path) if len(front) > 1 else ""


def _mark(point: Point, scale: Scale, across: Scale) -> str:
    x, css = _x(point, across), "r0" if point.front else "r7"
    low, high = (scale.at(end) for end in point.ends)
    whisker = tag("line", class_=f"whisker {css}", x1=x, x2=x, y1=low, y2=high)
    dot = tag(
        "circle",
        tag("title", text(point.tip)),
        class_=f"dot {css}",
        cx=x,
        cy=scale.at(point.value),
        r=5.0,
    )
    return (whisker if point.stderr else "") + dot


def _names(drawn: Sequence[Point], scale: Scale, across: Scale) -> str:
    """A name beside each dot, moved down where another one stands."""
    taken: list[tuple[float, float, float]] = []
    found = ""
    for point in sorted(drawn, key=lambda p: scale.at(p.value)):
        x, y, wide = _x(point, across), scale.at(point.value) + 4, len(point.name) * LETTER
        left = x + 10 + wide > WIDTH - RIGHT
        start = x - 10 - wide if left else x + 10
        while any(abs(y - b) < LINE and start < c and a < start + wide for a, b, c in taken):
            y += LINE
        taken.append((start, y, start + wide))
        anchor, at = ("end", x - 10) if left else ("start", x + 10)
        found += tag("text", text(point.name), class_="name", x=at, y=y, text_anchor=anchor)
    return found


def _frame(body: str, title: str, described: str) -> str:
    head = tag("title", text(title), id="front-title")
    head += tag("desc", text(described), id="front-desc")
    return tag(
        "svg",
        head,
        body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_labelledby="front-title front-desc",
        class_="chart",
    )


def standalone(figure: Figure, style: str) -> str:
    """The drawing as a file of its own, with its colours inside."""
    ground = tag("rect", class_="ground", width=WIDTH, height=HEIGHT)
    head, _, rest = figure.svg.partition(">")
    return f"{head}><style><![CDATA[{style}]]></style>{ground}{rest}\n"
