"""The front of size against predicted loss: a line of chosen plans, one of even plans, the targets.

Both axes are as in `report.front`: bytes from zero, the loss on a log scale if it spans decades.
Lines are dashed or not and dots named, so that the drawing reads without colour.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.report.formatting import format_bytes, format_number
from cptq.report.plans import FrontPoint, PlannedTarget, PlanView
from cptq.report.svg import (
    Figure,
    Scale,
    choose_scale,
    draw_levels,
    escape_text,
    format_tick,
    tag,
    wrap_svg,
)

WIDTH, HEIGHT = 960.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 90.0, 28.0, 48.0
_STROKE = "stroke-width:2;opacity:.8"
XMLNS = "http://www.w3.org/2000/svg"


def draw_plan_front(view: PlanView) -> Figure | None:
    """Draw the front; None if there are fewer than two points."""
    if len(view.front) < 2:
        return None
    losses = [loss for p in view.front for loss in (p.loss, p.uniform) if loss is not None]
    scale = choose_scale(losses, top=TOP, bottom=HEIGHT - BOTTOM)
    sizes = [point.nbytes / 1e6 for point in view.front]
    wide = choose_scale(sizes, top=WIDTH - RIGHT, bottom=LEFT)
    across = Scale(low=0.0, high=max(sizes) * 1.02, top=wide.top, bottom=wide.bottom)
    title = "Size and predicted loss"
    log = "; log scale" if scale.log else ""
    return Figure(
        ident="plan-front",
        title=title,
        caption=f"predicted loss, {view.score_unit}: lower is better{log}; each dot is a target",
        svg=_draw(view, scale, across, title),
        legend=(("r0", "chosen widths"), ("r7", "even widths (dashed)")),
    )


def _draw(view: PlanView, scale: Scale, across: Scale, title: str) -> str:
    chosen = [(point.nbytes, point.loss) for point in view.front]
    even = [(point.nbytes, p) for point in view.front if (p := point.uniform) is not None]
    body = _draw_axes(view, scale, across)
    place = _find_widest_gap(view, scale)
    body += _draw_line(even, scale, across, "r7", dash="5 4", name="even", place=place)
    body += _draw_line(chosen, scale, across, "r0", name="chosen", place=place)
    body += "".join(_draw_target(found, scale, across) for found in view.planned)
    words = "; ".join(_describe(point) for point in view.front)
    return wrap_svg(body, "plan-front", title, words, (WIDTH, HEIGHT), XMLNS)


def _describe(point: FrontPoint) -> str:
    even = "" if point.uniform is None else f", even widths {format_number(point.uniform)}"
    return f"{format_bytes(point.nbytes)}: {format_number(point.loss)}{even}"


def _draw_axes(view: PlanView, scale: Scale, across: Scale) -> str:
    bottom = HEIGHT - BOTTOM
    drawing = draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    for value in across.list_ticks():
        x = across.locate(value)
        drawing += tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom)
        label = format_tick(value)
        drawing += tag("text", label, class_="tick", x=x, y=bottom + 16, text_anchor="middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = "file, MB"
    drawing += tag("text", label, class_="tick", x=middle, y=HEIGHT - 8, text_anchor="middle")
    label = escape_text(f"predicted loss, {view.score_unit}")
    return drawing + tag("text", label, class_="tick", x=LEFT, y=TOP - 12)


def _draw_line(
    points: Sequence[tuple[int, float]],
    scale: Scale,
    across: Scale,
    css: str,
    *,
    name: str,
    place: int,
    dash: str | None = None,
) -> str:
    places = [(across.locate(n / 1e6), scale.locate(loss)) for n, loss in points]
    if len(places) < 2:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = tag("polyline", class_=f"line {css}", points=path, stroke_dasharray=dash, style=_STROKE)
    x, y = places[min(place, len(places) - 1)]
    at = y - 8 if name == "even" else y + 18
    anchor = "start" if name == "even" else "end"
    return line + tag("text", name, class_=f"tick {css}", x=x, y=at, text_anchor=anchor)


def _find_widest_gap(view: PlanView, scale: Scale) -> int:
    """Return where the lines are furthest apart and no target is: that is where their names go."""
    asked = {found.plan.predicted_bytes for found in view.planned}
    gaps = [
        0.0
        if point.uniform is None or point.nbytes in asked
        else scale.locate(point.loss) - scale.locate(point.uniform)
        for point in view.front
    ]
    return gaps.index(max(gaps))


def _draw_target(found: PlannedTarget, scale: Scale, across: Scale) -> str:
    loss, nbytes = found.plan.predicted_loss, found.plan.predicted_bytes
    if loss is None:
        return ""
    x, y = across.locate(nbytes / 1e6), scale.locate(loss)
    tip = f"{found.target}: {nbytes:,} bytes, predicted loss {format_number(loss)}"
    dot = tag("circle", tag("title", escape_text(tip)), class_="dot r0", cx=x, cy=y, r=5.0)
    return dot + tag("text", escape_text(found.target), class_="name", x=x + 9, y=y - 7)
