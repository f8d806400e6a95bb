"""Counts and comparisons that the renderings and the command line share. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite

from cptq.report.summary import Summary
from cptq.types import Candidate, LayerSpec, Notice, SensitivityTable

#: the order in which notices are shown: what changed the result first
NOTICE_ORDER = ("warning", "fallback", "skipped", "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthTally:
    """How much of the model is stored at one width."""

    label: str
    bits: int
    layers: int
    weights: int
    share: float


def layer_choices(summary: Summary) -> dict[str, Candidate]:
    """Name of each planned layer -> its candidate, in forward order."""
    plan = summary.plan
    if plan is None:
        return {}
    return {
        layer.name: plan.choices[unit.name]
        for unit in summary.units
        if unit.name in plan.choices
        for layer in unit.layers
    }


def widths(summary: Summary) -> list[WidthTally]:
    """Planned layers by candidate, narrowest first; `share` is of the planned weights."""
    specs = {layer.name: layer for unit in summary.units for layer in unit.layers}
    grouped: dict[Candidate, list[LayerSpec]] = {}
    for name, candidate in layer_choices(summary).items():
        grouped.setdefault(candidate, []).append(specs[name])
    total = sum(spec.numel for rows in grouped.values() for spec in rows) or 1
    return [
        WidthTally(
            label=candidate.label,
            bits=candidate.bits,
            layers=len(rows),
            weights=sum(row.numel for row in rows),
            share=sum(row.numel for row in rows) / total,
        )
        for candidate, rows in sorted(grouped.items())
    ]


def left_alone(summary: Summary) -> list[LayerSpec]:
    """Layers outside every unit: embeddings, heads, what cptq cannot compress."""
    units = {layer.name for unit in summary.units for layer in unit.layers}
    return [layer for layer in summary.layers if layer.name not in units]


def most_sensitive(table: SensitivityTable, count: int) -> list[tuple[str, float]]:
    """The `count` units with the highest score, highest first; ties in forward order."""
    ranked = [(unit, score) for unit, score in table.per_unit.items() if isfinite(score)]
    return sorted(ranked, key=lambda pair: -pair[1])[:count]


def notices_by_kind(notices: Iterable[Notice]) -> Mapping[str, list[Notice]]:
    """Notices grouped, the kinds that changed the result first; no kind is empty."""
    rows = list(notices)
    grouped = {kind: [row for row in rows if row.kind == kind] for kind in NOTICE_ORDER}
    return {kind: found for kind, found in grouped.items() if found}
