"""Essential sparsity: where the loss over one-shot magnitude pruning bends, without retraining.

Source: Jaiswal et al. (arXiv 2306.03805): the sparsity beyond which performance falls steeply with
one more percent. Measured here as the knee (`cptq.numerics.knee`) of the divergence from the dense
model on held-out text, of the whole model and of each unit alone, for shares and for N:M.

Departures: the paper prunes with one threshold for the whole model and judges after fine-tuning on
the task; here there is one threshold per matrix and no training. Cost: a forward pass per point of
the whole model, half of one per point and unit. Limits: a knee depends on the range that is looked
at, and among few points (N:4 has three) it is coarse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.knee import find_knee
from cptq.sensitivity.rounding import build_sparse_mask
from cptq.types import Candidate, Emit, Progress, Unit, compute_share

WHOLE = tuple(round(0.1 * step, 1) for step in range(1, 10))
#: of single units, whose points cost most
OF_UNITS = (0.2, 0.4, 0.6, 0.8)
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "N:4": ("3:4", "2:4", "1:4"),
    "N:8": ("7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8"),
}


def measure_essential(
    model: LoadedModel, divergence: DivergenceFromDense, emit: Emit
) -> dict[str, Any]:
    """Return curves and knees: of the whole model for shares, N:4 and N:8, of units for two."""
    kinds = {"unstructured": [_share(p) for p in WHOLE]}
    kinds |= {kind: [_pattern(p) for p in patterns] for kind, patterns in PATTERNS.items()}
    whole = {
        kind: _measure(model, divergence, list(model.units), row) for kind, row in kinds.items()
    }
    few = {"unstructured": [_share(p) for p in OF_UNITS], "N:4": kinds["N:4"]}
    units = {}
    for done, unit in enumerate(model.units):
        total = len(model.units)
        emit(Progress(stage="essential sparsity", done=done, total=total, message=unit.name))
        units[unit.name] = {k: _measure(model, divergence, [unit], row) for k, row in few.items()}
    emit(Progress(stage="essential sparsity", done=len(units), total=len(units)))
    return {"unit": divergence.unit, "tokens": divergence.tokens, "whole": whole, "units": units}


def _share(sparsity: float) -> Candidate:
    return Candidate(bits=16, sparsity=sparsity, pattern="unstructured")


def _pattern(pattern: str) -> Candidate:
    return Candidate(bits=16, sparsity=compute_share(pattern), pattern=pattern)


def _measure(
    model: LoadedModel,
    divergence: DivergenceFromDense,
    units: Sequence[Unit],
    row: Sequence[Candidate],
) -> dict[str, Any]:
    """Return the curve of these units pruned together, and its knee."""
    block = units[0].block if len(units) == 1 else None
    losses = [divergence.measure_layers(_prune(model, units, c), block) for c in row]
    places = [0.0, *(candidate.sparsity for candidate in row)]
    at = find_knee(places, [0.0, *losses])
    return {
        "sparsity": places[1:],
        "divergence": losses,
        "knee": None if at is None else places[at],
    }


def _prune(model: LoadedModel, units: Sequence[Unit], candidate: Candidate) -> dict[str, Tensor]:
    found = {}
    for unit in units:
        for spec in unit.layers:
            W_OI = get_weight(model.linear(spec.name)).float()
            found[spec.name] = W_OI * build_sparse_mask(W_OI, candidate)
    return found
