"""Figures of `--sparsity-analysis`: one mark per unit or feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cptq.report.formatting import format_number
from cptq.report.plots import Mark, draw_dots
from cptq.report.summary import Summary
from cptq.report.svg import Figure

Rows = Mapping[str, float | None]


def draw_sparsity(summary: Summary) -> list[Figure]:
    """Draw what was measured; nothing where there was no such analysis."""
    tables = summary.sparsity
    if not tables:
        return []
    units = tables["weight-inequality"]["units"]
    figures = [
        _draw(
            summary,
            "sparsity-weights",
            "Inequality of weights",
            "share of the weights that may go by the SAP bound, and Gini coefficient",
            {
                "may go": {name: row["prunable"] for name, row in units.items()},
                "Gini": {name: row["gini"] for name, row in units.items()},
            },
        ),
        _draw(
            summary,
            "sparsity-knee",
            "Essential sparsity",
            "sparsity at the knee of a unit's divergence; none where it has no knee",
            {
                kind: {
                    name: row[kind]["knee"]
                    for name, row in tables["essential-sparsity"]["units"].items()
                }
                for kind in ("unstructured", "N:4")
            },
        ),
    ]
    if "lazy-neurons" in tables:
        figures.append(_draw_zeros(summary, tables["lazy-neurons"]))
    if "cett" in tables:
        series = {
            f"PPL +{point['percent']:g}%": {
                name: layer["sparsity"] for name, layer in point["layers"].items()
            }
            for point in tables["cett"]["points"]
        }
        title = "Activations that may go"
        unit = "share of a feed-forward layer's activations below its threshold (CETT-PPL)"
        figures.append(_draw(summary, "sparsity-cett", title, unit, series))
    return figures


def _draw_zeros(summary: Summary, table: Mapping[str, Any]) -> Figure:
    texts = (("text", "text"), ("random_tokens", "random tokens"))
    series = {
        f"{word}, {label}": {name: row[kind] for name, row in table[key].items()}
        for key, label in texts
        for kind, word in (("zero", "zero"), ("near_zero", "near zero"))
    }
    unit = f"share of activations that are 0, or at most {table['near']:g} of the token's largest"
    return _draw(summary, "sparsity-lazy", "Lazy neurons", unit, series)


def _draw(
    summary: Summary, ident: str, title: str, unit: str, series: Mapping[str, Rows]
) -> Figure:
    """Draw some series of numbers of units or layers."""
    blocks: dict[str, int | None] = {spec.name: spec.block for spec in summary.layers}
    blocks |= {item.name: item.block for item in summary.units}
    marks = [
        Mark(
            name=name,
            block=blocks.get(name),
            value=value,
            css=f"r{place}",
            tip=f"{name}: {label} {format_number(value)}",
            series=label,
        )
        for place, (label, rows) in enumerate(series.items())
        for name, value in _list_known(rows)
    ]
    svg, remarks = draw_dots(marks, ident, title, unit)
    legend = tuple((f"r{place}", label) for place, label in enumerate(series))
    caption = "; ".join([unit[0].upper() + unit[1:], *remarks])
    return Figure(ident=ident, title=title, caption=caption, svg=svg, legend=legend)


def _list_known(rows: Rows) -> Iterable[tuple[str, float]]:
    return ((name, value) for name, value in rows.items() if value is not None)
