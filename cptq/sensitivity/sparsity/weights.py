"""How unequal the weights of each unit are: PQ Index, what the SAP bound lets go, Gini.

Equations and sources in `cptq.numerics.inequality`. A unit's numbers are the means of its layers',
by their weights. Cost: one pass over the weights, with a sort.
"""

from __future__ import annotations

from typing import Any

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.inequality import bound_prunable, compute_gini, compute_pq_index
from cptq.types import Unit


def measure_inequality(model: LoadedModel) -> dict[str, dict[str, Any]]:
    """Return {unit: {"pq_index", "prunable", "gini"}}."""
    return {unit.name: _measure_unit(model, unit) for unit in model.units}


def _measure_unit(model: LoadedModel, unit: Unit) -> dict[str, Any]:
    index = gini = 0.0
    for spec in unit.layers:
        W_OI = get_weight(model.linear(spec.name)).float()
        share = spec.numel / unit.numel
        index += share * compute_pq_index(W_OI)
        gini += share * compute_gini(W_OI)
    return {"pq_index": index, "prunable": bound_prunable(index), "gini": gini}
