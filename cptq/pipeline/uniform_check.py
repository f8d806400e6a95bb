"""`--check-uniform`: keep the better plan, the mixed one or the baseline plan that needs no scores.

Both are carried out by the run's own compressor and compared on held-out text that neither
calibrated nor chose. The baseline plan is `even`: uniform where the target is a whole number of
bits, otherwise two neighbouring widths spread over depth, so that both take the same bytes. Cost:
one more compression, and the dense weights once more in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.numerics.grid import dequantize_layer
from cptq.report.formatting import format_number
from cptq.types import CompressedLayer, Emit, Event, Notice, Plan, Progress

#: the allocator of the baseline plan
BASELINE = "even"

Compress = Callable[[Plan, Emit], list[CompressedLayer]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """One plan carried out: its layers, its notices, and the divergence of each held-out row."""

    plan: Plan
    layers: list[CompressedLayer]
    notices: list[Event]
    rows: Tensor

    @property
    def divergence(self) -> float:
        return float(self.rows.mean())


def keep_better_plan(
    model: LoadedModel,
    plan: Plan,
    baseline: Plan,
    compress: Compress,
    divergence: DivergenceFromDense,
    emit: Emit,
) -> tuple[Plan, list[CompressedLayer]]:
    """Carry out both plans and return the better one; `model` then has its weights.

    Args:
        model: dense.
        plan: the mixed plan; at equal divergence it is kept.
        baseline: the plan that needs no scores.
        compress: carries a plan out on the dense model, whose weights it changes.
        divergence: from the model before anything of it was compressed, on held-out text.
        emit: receives the notices of the better plan only, and the result.
    """
    dense = _copy_weights(model)
    other = _carry_out(baseline, compress, divergence, emit)
    for name, W_OI in dense.items():
        set_weight(model.linear(name), W_OI)
    own = _carry_out(plan, compress, divergence, emit)
    better = own if own.divergence <= other.divergence else other
    if better is other:
        for name, W_OI in dense.items():
            set_weight(model.linear(name), W_OI)
        for layer in other.layers:
            set_weight(model.linear(layer.spec.name), dequantize_layer(layer, model.dtype))
    for event in better.notices:
        emit(event)
    note = _describe_result(own, other, divergence)
    emit(note)
    return replace(better.plan, notes=(*better.plan.notes, note.message)), better.layers


def _copy_weights(model: LoadedModel) -> dict[str, Tensor]:
    return {
        spec.name: get_weight(model.linear(spec.name)).clone()
        for unit in model.all_units
        for spec in unit.layers
    }


@torch.no_grad()
def _carry_out(
    plan: Plan, compress: Compress, divergence: DivergenceFromDense, emit: Emit
) -> _Outcome:
    notices: list[Event] = []

    def collect(event: Event) -> None:
        if isinstance(event, Progress):
            emit(replace(event, stage=f"{event.stage} {plan.allocator}"))
        else:
            notices.append(event)

    layers = compress(plan, collect)
    return _Outcome(plan=plan, layers=layers, notices=notices, rows=divergence.measure_rows())


def _describe_result(own: _Outcome, other: _Outcome, divergence: DivergenceFromDense) -> Notice:
    labels = {c.label for c in other.plan.choices.values() if not c.float8}
    baseline = f"uniform {labels.pop()}" if len(labels) == 1 else "two widths spread evenly"
    numbers = (
        f"{format_number(own.divergence)} against {format_number(other.divergence)} "
        f"{divergence.unit} ({divergence.describe_difference(own.rows - other.rows)})"
    )
    if own.divergence <= other.divergence:
        message = f"the mixed plan is kept: {numbers} of {baseline} at the same bytes"
        return Notice(kind="info", subject="--check-uniform", message=message)
    message = (
        f"the mixed plan loses to {baseline} at the same bytes, {numbers}: the latter is shipped"
    )
    return Notice(kind="warning", subject="--check-uniform", message=message)
