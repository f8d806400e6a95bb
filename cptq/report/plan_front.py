"""The front of size against predicted loss: a line of chosen plans, one of even plans, some named.

Both axes are as in `report.front`: bytes from zero, the loss on a log scale if it spans decades.
Lines are dashed or not and dots named, so that the drawing reads without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cptq.report.formatting import format_bytes, format_number
from cptq.report.plans import CARRIED_OUT, PlanView
from cptq.report.summary import FrontPoint, Summary
from cptq.report.svg import (
    Figure,
    Scale,
    choose_scale,
    draw_columns,
    draw_levels,
    escape_text,
    tag,
    wrap_svg,
)

WIDTH, HEIGHT = 960.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 90.0, 28.0, 48.0
TITLE = "Size and predicted loss"
XMLNS = "http://www.w3.org/2000/svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A plan that has a name in the drawing; `loss` is None where none is predicted."""

    name: str
    nbytes: int
    loss: float | None


def draw_plan_front(view: PlanView) -> Figure | None:
    """Draw the front with the targets that were asked for; None if there are under two points."""
    dots = [
        Dot(name=found.target, nbytes=plan.predicted_bytes, loss=plan.predicted_loss)
        for found in view.planned
        for plan in (found.plan,)
    ]
    return _draw_front(view.front, dots, view.score_unit, XMLNS)


def draw_run_front(summary: Summary) -> Figure | None:
    """Draw the front of a run's measurement, the plan that was carried out marked."""
    plan = summary.plan
    if plan is None:
        return None
    table = summary.sensitivity.get(plan.metric or "")
    dot = Dot(name=CARRIED_OUT, nbytes=plan.predicted_bytes, loss=plan.predicted_loss)
    return _draw_front(summary.front, [dot], table.score_unit if table else "score")


def _draw_front(
    front: Sequence[FrontPoint], dots: Sequence[Dot], unit: str, xmlns: str | None = None
) -> Figure | None:
    """Draw a front; `xmlns` for a file of its own."""
    if len(front) < 2:
        return None
    losses = [loss for p in front for loss in (p.loss, p.uniform) if loss is not None]
    scale = choose_scale(losses, top=TOP, bottom=HEIGHT - BOTTOM)
    sizes = [point.nbytes / 1e6 for point in front]
    wide = choose_scale(sizes, top=WIDTH - RIGHT, bottom=LEFT)
    across = Scale(low=0.0, high=max(sizes) * 1.02, top=wide.top, bottom=wide.bottom)
    log = "; log scale" if scale.log else ""
    return Figure(
        ident="plan-front",
        title=TITLE,
        caption=f"predicted loss, {unit}: lower is better{log}; interactions between units are not "
        "in it; dots: plans that were made",
        svg=_draw(front, dots, unit, (scale, across), xmlns),
        legend=(("r0", "chosen widths"), ("r7", "even widths (dashed)")),
    )


def _draw(
    front: Sequence[FrontPoint],
    dots: Sequence[Dot],
    unit: str,
    scales: tuple[Scale, Scale],
    xmlns: str | None,
) -> str:
    scale, across = scales
    chosen = [(point.nbytes, point.loss) for point in front]
    even = [(point.nbytes, p) for point in front if (p := point.uniform) is not None]
    body = _draw_axes(unit, scale, across)
    place = _find_widest_gap(front, dots, scale)
    body += _draw_line(even, scale, across, "r7", dash="5 4", name="even", place=place)
    body += _draw_line(chosen, scale, across, "r0", name="chosen", place=place)
    body += "".join(_draw_dot(dot, scale, across) for dot in dots)
    words = "; ".join(_describe(point) for point in front)
    return wrap_svg(body, "plan-front", TITLE, words, (WIDTH, HEIGHT), xmlns)


def _describe(point: FrontPoint) -> str:
    even = "" if point.uniform is None else f", even widths {format_number(point.uniform)}"
    return f"{format_bytes(point.nbytes)}: {format_number(point.loss)}{even}"


def _draw_axes(unit: str, scale: Scale, across: Scale) -> str:
    drawing = draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    drawing += draw_columns(across, top=TOP, bottom=HEIGHT - BOTTOM)
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = "file, MB"
    drawing += tag("text", label, class_="tick", x=middle, y=HEIGHT - 8, text_anchor="middle")
    label = escape_text(f"predicted loss, {unit}")
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
    line = tag("polyline", class_=f"line strong {css}", points=path, stroke_dasharray=dash)
    x, y = places[min(place, len(places) - 1)]
    at = y - 8 if name == "even" else y + 18
    anchor = "start" if name == "even" else "end"
    return line + tag("text", name, class_=f"tick {css}", x=x, y=at, text_anchor=anchor)


def _find_widest_gap(front: Sequence[FrontPoint], dots: Sequence[Dot], scale: Scale) -> int:
    """Return where the lines are furthest apart and no dot is: that is where their names go."""
    taken = {dot.nbytes for dot in dots}
    gaps = [
        0.0
        if point.uniform is None or point.nbytes in taken
        else scale.locate(point.loss) - scale.locate(point.uniform)
        for point in front
    ]
    return gaps.index(max(gaps))


def _draw_dot(found: Dot, scale: Scale, across: Scale) -> str:
    if found.loss is None:
        return ""
    x, y = across.locate(found.nbytes / 1e6), scale.locate(found.loss)
    tip = f"{found.name}: {found.nbytes:,} bytes, predicted loss {format_number(found.loss)}"
    dot = tag("circle", tag("title", escape_text(tip)), class_="dot r0", cx=x, cy=y, r=5.0)
    return dot + tag("text", escape_text(found.name), class_="name", x=x + 9, y=y - 7)
