"""The size-quality front: a dot per model, whiskers for 95% intervals, a line along the front.

The size axis starts at zero, so that half the length is half the bytes. The quality axis covers
only the range of the values, on a log scale if they span decades. The line is a staircase, because
nothing is known between two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite

from cptq.report.comparison import ComparedModel, ModelComparison
from cptq.report.formatting import format_bytes, format_with_error, shorten_tasks
from cptq.report.svg import (
    Figure,
    Scale,
    choose_scale,
    choose_step,
    draw_columns,
    draw_levels,
    escape_text,
    tag,
    wrap_svg,
)

WIDTH, HEIGHT = 960.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 20.0, 20.0, 48.0
#: half width of a 95% interval, in standard errors
NORMAL = 1.96
#: pixels of a line of text and of a letter
LINE, LETTER = 14.0, 6.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model of the drawing: its bytes and its quality."""

    name: str
    nbytes: int
    value: float
    stderr: float
    front: bool

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of the 95% interval."""
        return self.value - NORMAL * self.stderr, self.value + NORMAL * self.stderr

    @property
    def tip(self) -> str:
        """Text of the tooltip."""
        value = format_with_error(self.value, self.stderr or None)
        return f"{self.name}: {format_bytes(self.nbytes)}, {value}"


def collect_points(comparison: ModelComparison) -> list[Point]:
    """Return the models with a known size and a finite quality, smallest first."""
    points = [point for model in comparison.models if (point := _find_point(comparison, model))]
    return sorted(points, key=lambda point: (point.nbytes, point.name))


def _find_point(comparison: ModelComparison, model: ComparedModel) -> Point | None:
    result = comparison.find_quality(model)
    if model.weight_bytes is None or result is None or not isfinite(result.value):
        return None
    return Point(
        name=model.name,
        nbytes=model.weight_bytes,
        value=result.value,
        stderr=result.stderr or 0.0,
        front=comparison.is_on_front(model),
    )


def choose_value_scale(drawn: Sequence[Point]) -> Scale:
    """Return a scale around the values and their intervals; logarithmic if they span decades."""
    top, bottom = TOP, HEIGHT - BOTTOM
    values = [point.value for point in drawn]
    wide = choose_scale(values, top=top, bottom=bottom)
    if wide.log:
        return wide
    ends = [end for point in drawn for end in point.ends]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    step = choose_step(low - room, high + room)
    low, high = floor((low - room) / step) * step, ceil((high + room) / step) * step
    return Scale(low=low, high=high, top=top, bottom=bottom)


def draw_front(comparison: ModelComparison) -> Figure | None:
    """Draw the front; None if fewer than two models have both numbers."""
    points = collect_points(comparison)
    if len(points) < 2:
        return None
    across = choose_scale([p.nbytes / 1e6 for p in points], top=WIDTH - RIGHT, bottom=LEFT)
    if across.log:
        across = Scale(low=0.0, high=across.high, top=WIDTH - RIGHT, bottom=LEFT)
    scale = choose_value_scale(points)
    task, metric = comparison.quality
    title = f"Size and {metric} ({shorten_tasks([task])[task]})"
    better = "higher" if comparison.higher_is_better else "lower"
    log = "; log scale" if scale.log else ""
    return Figure(
        ident="front",
        title=title,
        caption=f"{metric}: {better} is better; whiskers: 95% interval of each value (differences "
        f"on the same samples are more precise, see the table){log}",
        svg=_draw_svg(points, scale, across, title, metric),
        legend=(("r0", "on the front"), ("r7", "another model is as small and as good")),
    )


def _draw_svg(points: Sequence[Point], scale: Scale, across: Scale, title: str, metric: str) -> str:
    body = _draw_axes(scale, across, metric) + _draw_stairs(points, scale, across)
    body += "".join(_draw_point(point, scale, across) for point in points)
    body += _draw_names(points, scale, across)
    description = "; ".join(point.tip + (" (front)" if point.front else "") for point in points)
    xmlns = "http://www.w3.org/2000/svg"
    return wrap_svg(body, "front", title, description, (WIDTH, HEIGHT), xmlns)


def _draw_axes(scale: Scale, across: Scale, metric: str) -> str:
    drawing = draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    drawing += draw_columns(across, top=TOP, bottom=HEIGHT - BOTTOM)
    middle, end = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8
    label = "weight file, MB"
    drawing += tag("text", label, class_="tick", x=middle, y=end, text_anchor="middle")
    label = escape_text(metric)
    return drawing + tag("text", label, class_="tick", x=LEFT - 8, y=TOP - 8, text_anchor="end")


def _find_x(point: Point, across: Scale) -> float:
    return across.locate(point.nbytes / 1e6)


def _draw_stairs(points: Sequence[Point], scale: Scale, across: Scale) -> str:
    front = [point for point in points if point.front]
    corners: list[tuple[float, float]] = []
    for point in front:
        x, y = _find_x(point, across), scale.locate(point.value)
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return tag("polyline", class_="line r0", points=path) if len(front) > 1 else ""


def _draw_point(point: Point, scale: Scale, across: Scale) -> str:
    x, css = _find_x(point, across), "r0" if point.front else "r7"
    low, high = (scale.locate(end) for end in point.ends)
    whisker = tag("line", class_=f"whisker {css}", x1=x, x2=x, y1=low, y2=high)
    dot = tag(
        "circle",
        tag("title", escape_text(point.tip)),
        class_=f"dot {css}",
        cx=x,
        cy=scale.locate(point.value),
        r=5.0,
    )
    return (whisker if point.stderr else "") + dot


def _draw_names(points: Sequence[Point], scale: Scale, across: Scale) -> str:
    """Draw a name beside each dot, moved down where it would overlap another."""
    taken: list[tuple[float, float, float]] = []
    drawing = ""
    for point in sorted(points, key=lambda p: scale.locate(p.value)):
        x, y, wide = _find_x(point, across), scale.locate(point.value) + 4, len(point.name) * LETTER
        left = x + 10 + wide > WIDTH - RIGHT
        start = x - 10 - wide if left else x + 10
        while any(abs(y - b) < LINE and start < c and a < start + wide for a, b, c in taken):
            y += LINE
        taken.append((start, y, start + wide))
        anchor, at = ("end", x - 10) if left else ("start", x + 10)
        drawing += tag(
            "text", escape_text(point.name), class_="name", x=at, y=y, text_anchor=anchor
        )
    return drawing


def make_standalone(figure: Figure, style: str) -> str:
    """Return the drawing as an SVG file with its style sheet inside."""
    background = tag("rect", class_="ground", width=WIDTH, height=HEIGHT)
    head, _, rest = figure.svg.partition(">")
    return f"{head}><style><![CDATA[{style}]]></style>{background}{rest}\n"
