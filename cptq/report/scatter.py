"""Scores against the truth: one panel per metric, one dot per pair, coloured by width.

Both axes are logarithmic where their values span decades. A score that ranks well makes a rising
band; one that only knows the width makes flat clouds, one a colour.
"""

from __future__ import annotations

from math import isfinite

from cptq.report.plots import Figure
from cptq.report.svg import Scale, choose_scale, tag, text, tick_label
from cptq.report.validation import interval
from cptq.report.words import number
from cptq.types import Agreement, Pair, Validation

PANEL, HEIGHT, ACROSS = 320.0, 250.0, 3
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 34.0, 38.0


def scatter_figure(found: Validation | None, ident: str = "validation") -> Figure | None:
    """Small drawings side by side; None without pairs."""
    if found is None or not found.pairs or not found.agreements:
        return None
    rows = -(-len(found.agreements) // ACROSS)
    body = "".join(
        tag(
            "g",
            _panel(row, found),
            transform=f"translate({(k % ACROSS) * PANEL:g} {(k // ACROSS) * HEIGHT:g})",
        )
        for k, row in enumerate(found.agreements)
    )
    title = "Scores against the measured truth"
    told = "; ".join(f"{row.metric} {row.spearman_within.value:.2f}" for row in found.agreements)
    head = tag("title", text(title), id=f"{ident}-title")
    described = f"one dot per unit and width; Spearman within widths: {told}"
    head += tag("desc", text(described), id=f"{ident}-desc")
    across = min(ACROSS, len(found.agreements))
    drawing = tag(
        "svg",
        head,
        body,
        viewBox=f"0 0 {across * PANEL:g} {rows * HEIGHT:g}",
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_="chart",
    )
    bits = sorted({pair.candidate.bits for pair in found.pairs})
    return Figure(
        ident=ident,
        title=title,
        caption=f"Upwards: measured divergence ({found.unit}). To the right: the score. Hollow: "
        "zero, on the edge. rho: Spearman within widths, with its 95% interval",
        svg=drawing,
        legend=tuple((f"b{width}", f"{width} bits") for width in bits),
    )


def _panel(row: Agreement, found: Validation) -> str:
    pairs = [p for p in found.pairs if isfinite(p.truth) and isfinite(p.scores[row.metric])]
    low, high = LEFT, PANEL - RIGHT
    # a scale runs from its bottom pixel to its top one: for x these are left and right
    across = choose_scale([p.scores[row.metric] for p in pairs], top=high, bottom=low)
    upward = choose_scale([p.truth for p in pairs], top=TOP, bottom=HEIGHT - BOTTOM)
    name = tag("text", text(row.metric), class_="name", x=LEFT, y=14.0)
    rho = f"rho {interval(row.spearman_within)}"
    words = tag("text", text(rho), class_="tick", x=LEFT, y=28.0)
    dots = "".join(_dot(p, p.scores[row.metric], across, upward) for p in pairs)
    return name + words + _grid(across, upward) + dots


def _dot(pair: Pair, score: float, across: Scale, upward: Scale) -> str:
    edge = (across.log and score <= 0) or (upward.log and pair.truth <= 0)
    words = (
        f"{pair.unit} at {pair.candidate.label}: score {number(score)}, truth {number(pair.truth)}"
    )
    return tag(
        "circle",
        tag("title", text(words)),
        class_=f"dot b{pair.candidate.bits}{' hollow' if edge else ''}",
        cx=across.at(score),
        cy=upward.at(pair.truth),
        r=3.2,
    )


def _grid(across: Scale, upward: Scale) -> str:
    found = ""
    for value in upward.ticks():
        y = upward.at(value)
        found += tag("line", class_="grid", x1=LEFT, x2=PANEL - RIGHT, y1=y, y2=y)
        found += tag(
            "text", tick_label(value), class_="tick", x=LEFT - 6, y=y + 4, text_anchor="end"
        )
    free = 0.0
    for value in across.ticks():
        x = across.at(value)
        found += tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
        if x >= free:
            found += tag(
                "text",
                tick_label(value),
                class_="tick",
                x=x,
                y=HEIGHT - BOTTOM + 15,
                text_anchor="middle",
            )
            free = x + 44.0
    return found
