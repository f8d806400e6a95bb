"""The sparse layers of a plan, by role and candidate."""

from __future__ import annotations

from cptq.report.formatting import Table, format_count, format_percent
from cptq.report.summary import Summary, map_layer_choices
from cptq.types import Candidate, LayerSpec


def build_sparsity_table(summary: Summary) -> Table | None:
    """Build the table of pruned weights; None where no layer is sparse."""
    specs = {layer.name: layer for unit in summary.units for layer in unit.layers}
    groups: dict[tuple[str, Candidate], list[LayerSpec]] = {}
    for name, choice in map_layer_choices(summary).items():
        groups.setdefault((specs[name].role, choice), []).append(specs[name])
    if not any(choice.sparsity for _, choice in groups):
        return None
    rows, pruned, planned = [], 0.0, 0
    for (role, choice), layers in groups.items():
        weights = sum(layer.numel for layer in layers)
        planned += weights
        pruned += choice.sparsity * weights
        if choice.sparsity:
            pattern = choice.pattern if ":" in choice.pattern else "unstructured"
            share = format_percent(choice.sparsity)
            cells = (role, choice.label, pattern, str(len(layers)))
            rows.append((*cells, format_count(weights), share))
    columns = ("role", "stored as", "pattern", "layers", "weights", "zero")
    return Table(
        title="Sparsity",
        columns=columns,
        rows=tuple(rows),
        right=columns[3:],
        note=f"{format_percent(pruned / max(1, planned))} of the planned weights are zero",
        leading=True,
    )
