"""The sensitivity of the blocks by all metrics on one axis, with the outer 30% as bands.

Metrics have different units, so each is divided by its own mean over the blocks: 1 is an average
block. CPTQuant (arXiv 2412.03599) holds the first and last 30% of the blocks to be the sensitive
ones; the table gives each metric's mean there and in the middle. Metrics differ by dash and by a
name at the end of the line, so that colour is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cptq.report.formatting import Table, format_number, format_plural
from cptq.report.summary import Summary
from cptq.report.svg import Figure, Scale, choose_scale, draw_levels, escape_text, tag, wrap_svg
from cptq.types import count_end_blocks

WIDTH, HEIGHT = 960.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 150.0, 18.0, 34.0
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 5", "12 4", "6 2 1 2")
LINE = 13.0

Curves = Mapping[str, Mapping[int, float]]


def relate_blocks(summary: Summary) -> Curves:
    """Return {metric: {block: score / mean score}}; without metrics whose mean is not positive."""
    found = {}
    for name, table in summary.sensitivity.items():
        rows = {b: score for b, score in table.per_block.items() if math.isfinite(score)}
        mean = sum(rows.values()) / len(rows) if rows else 0.0
        if len(rows) > 1 and mean > 0:
            found[name] = {block: rows[block] / mean for block in sorted(rows)}
    return found


def split_depth(blocks: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Return the first 30% of the blocks (at least one), the middle ones, and the last 30%."""
    count = count_end_blocks(len(blocks))
    ordered = sorted(blocks)
    return ordered[:count], ordered[count:-count], ordered[-count:]


def draw_sensitivity_axis(summary: Summary, ident: str = "depth-sensitivity") -> Figure | None:
    """Draw a line per metric; None with fewer than two metrics or blocks."""
    curves = relate_blocks(summary)
    if len(curves) < 2:
        return None
    blocks = sorted({block for rows in curves.values() for block in rows})
    scale = choose_scale(
        [value for rows in curves.values() for value in rows.values()],
        top=TOP,
        bottom=HEIGHT - BOTTOM,
    )
    step = (WIDTH - LEFT - RIGHT) / len(blocks)
    at = {block: LEFT + (index + 0.5) * step for index, block in enumerate(blocks)}
    body = _draw_outer_bands(blocks, at, step) + draw_levels(scale, left=LEFT, right=WIDTH - RIGHT)
    every = math.ceil(len(blocks) / 24)
    for block in blocks[::every]:
        body += tag(
            "text",
            str(block),
            class_="tick",
            x=at[block],
            y=HEIGHT - BOTTOM + 14,
            text_anchor="middle",
        )
    body += _draw_curves(curves, at, scale) + _draw_names(curves, scale)
    title = "Sensitivity over depth by all metrics"
    words = f"{format_plural(len(curves), 'metric')} over {format_plural(len(blocks), 'block')}"
    caption = (
        "Score of a block over the mean block of the same metric; shaded: first and last 30% of "
        "the blocks"
    )
    return Figure(
        ident=ident,
        title=title,
        caption=caption + ("; log scale" if scale.log else ""),
        svg=wrap_svg(body, ident, title, words, (WIDTH, HEIGHT)),
    )


def _draw_outer_bands(blocks: Sequence[int], at: Mapping[int, float], step: float) -> str:
    first, _, last = split_depth(blocks)
    drawing = ""
    for rows, label in ((first, "first 30%"), (last, "last 30%")):
        left, right = at[rows[0]] - step / 2, at[rows[-1]] + step / 2
        drawing += tag(
            "rect", class_="shade", x=left, y=TOP, width=right - left, height=HEIGHT - BOTTOM - TOP
        )
        drawing += tag(
            "text", label, class_="tick", x=(left + right) / 2, y=12, text_anchor="middle"
        )
    return drawing


def _draw_curves(curves: Curves, at: Mapping[int, float], scale: Scale) -> str:
    drawing = ""
    for index, (metric, rows) in enumerate(curves.items()):
        points = " ".join(f"{at[b]:.1f},{scale.locate(value):.1f}" for b, value in rows.items())
        css = f"curve r{index % 8}"
        dash = DASHES[index % len(DASHES)] or None
        tip = tag("title", escape_text(metric))
        drawing += tag("polyline", tip, class_=css, points=points, stroke_dasharray=dash)
    return drawing


def _draw_names(curves: Curves, scale: Scale) -> str:
    """Write the names at the ends of the lines, apart from each other."""
    ends = sorted(
        (scale.locate(list(rows.values())[-1]), index, metric)
        for index, (metric, rows) in enumerate(curves.items())
    )
    drawing, free = "", TOP
    room = LINE * len(ends)
    for place, (y, index, metric) in enumerate(ends):
        latest = HEIGHT - (room - LINE * place)
        at = min(max(y + 4, free), max(latest, free))
        free = at + LINE
        drawing += tag(
            "text", escape_text(metric), class_=f"end r{index % 8}", x=WIDTH - RIGHT + 6, y=at
        )
    return drawing


def measure_depth(summary: Summary) -> dict[str, dict[str, float]]:
    """Return {metric: {"first", "middle", "last": mean relative score}}."""
    found = {}
    for metric, rows in relate_blocks(summary).items():
        names = ("first", "middle", "last")
        found[metric] = {
            name: sum(rows[b] for b in part) / len(part)
            for name, part in zip(names, split_depth(list(rows)), strict=True)
            if part
        }
    return found


def build_depth_table(summary: Summary) -> Table | None:
    """Build the table of relative sensitivity in the outer bands; None without metrics."""
    rows = tuple(
        (metric, *(format_number(means.get(name), 3) for name in ("first", "middle", "last")))
        for metric, means in measure_depth(summary).items()
    )
    if not rows:
        return None
    columns = ("metric", "first 30%", "middle", "last 30%")
    return Table(
        title="Are the first and last blocks more sensitive?",
        columns=columns,
        rows=rows,
        right=columns[1:],
        note="mean score of a block there over the mean of all blocks; 1 is an average block",
    )
