"""The size-quality front of plans that were predicted from the measurement, not carried out.

One dot per plan: the bytes of its file and the sum of its scores; circles for the run's allocator,
squares for the baseline one, a ring and a name for the plan that was carried out.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.report.formatting import Table, format_bytes, format_number
from cptq.report.summary import FrontPoint, Summary
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

WIDTH, HEIGHT = 960.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 20.0, 20.0, 44.0
TITLE = "Predicted size and loss"


def draw_predicted_front(summary: Summary, ident: str = "predicted-front") -> Figure | None:
    """Draw the front; None with fewer than three plans."""
    points = summary.front
    if len(points) < 3:
        return None
    across = _choose_sizes(points)
    scale = choose_scale([point.loss for point in points], top=TOP, bottom=HEIGHT - BOTTOM)
    names = _list_allocators(points)
    body = _draw_axes(scale, across)
    for place, name in enumerate(names):
        own = [point for point in points if point.allocator == name]
        path = " ".join(f"{across.locate(p.nbytes):.1f},{scale.locate(p.loss):.1f}" for p in own)
        body += tag("polyline", class_=f"line r{place}{' dashed' * bool(place)}", points=path)
        body += "".join(_draw_point(point, place, scale, across) for point in own)
    body += "".join(_mark(point, scale, across) for point in points if point.chosen)
    unit = _find_unit(summary)
    words = "; ".join(_describe(point) for point in points)
    caption = (
        f"Predicted loss: sum of the units' scores ({unit}), lower is better; interactions between "
        "units are not in it. Squares: the baseline plan"
    )
    return Figure(
        ident=ident,
        title=TITLE,
        caption=caption + ("; log scale" if scale.log else ""),
        svg=wrap_svg(body, ident, TITLE, words, (WIDTH, HEIGHT)),
        legend=tuple((f"r{place}", name) for place, name in enumerate(names)),
    )


def _list_allocators(points: Sequence[FrontPoint]) -> list[str]:
    """Return the allocators, the baseline `even` last."""
    return sorted({point.allocator for point in points}, key=lambda name: (name == "even", name))


def _find_unit(summary: Summary) -> str:
    metric = summary.plan.metric if summary.plan else None
    table = summary.sensitivity.get(metric or "")
    return table.score_unit if table else "score"


def _choose_sizes(points: Sequence[FrontPoint]) -> Scale:
    sizes = [point.nbytes for point in points]
    room = 0.04 * (max(sizes) - min(sizes)) or 1.0
    return Scale(low=min(sizes) - room, high=max(sizes) + room, top=WIDTH - RIGHT, bottom=LEFT)


def _draw_axes(scale: Scale, across: Scale) -> str:
    drawing = draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    bottom = HEIGHT - BOTTOM
    for value in across.list_ticks():
        x, label = across.locate(value), format_tick(value / 1e6)
        drawing += tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom)
        drawing += tag("text", label, class_="tick", x=x, y=bottom + 16, text_anchor="middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = tag("text", "file, MB", class_="tick", x=middle, y=HEIGHT - 6, text_anchor="middle")
    return drawing + label


def _draw_point(point: FrontPoint, place: int, scale: Scale, across: Scale) -> str:
    x, y = across.locate(point.nbytes), scale.locate(point.loss)
    tip = tag("title", escape_text(_describe(point)))
    if place:
        return tag("rect", tip, class_=f"dot r{place}", x=x - 4, y=y - 4, width=8.0, height=8.0)
    return tag("circle", tip, class_=f"dot r{place}", cx=x, cy=y, r=4.5)


def _mark(point: FrontPoint, scale: Scale, across: Scale) -> str:
    x, y = across.locate(point.nbytes), scale.locate(point.loss)
    left = x > WIDTH / 2
    return tag("circle", class_="ring", cx=x, cy=y, r=9.0) + tag(
        "text",
        "carried out",
        class_="name",
        x=x - 14 if left else x + 14,
        y=y - 10,
        text_anchor="end" if left else "start",
    )


def _describe(point: FrontPoint) -> str:
    words = f"{point.allocator}: {format_bytes(point.nbytes)}, loss {format_number(point.loss)}"
    return words + (" (carried out)" if point.chosen else "")


def build_predicted_front_table(summary: Summary) -> Table | None:
    """Build the table of the plans of the front; None without."""
    rows = tuple(
        (
            f"{point.nbytes:,}",
            point.allocator,
            format_number(point.loss),
            "carried out" if point.chosen else "",
        )
        for point in summary.front
    )
    if not rows:
        return None
    return Table(
        title="Plans predicted from the measurement",
        columns=("bytes", "allocator", "predicted loss", ""),
        rows=rows,
        right=("bytes", "predicted loss"),
        folded=True,
    )
