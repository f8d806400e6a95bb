"""A mixed plan must beat the plan that asks no score, or that one is shipped.

Both are carried out for good, by the run's own compressor, and judged on text that neither
calibrated nor chose. The rival is `even`: uniform where the target is a whole number of bits, else
two neighbouring widths spread over depth, so that both take the same bytes. Cost: one compression
more, and the dense weights once more in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptq.calibration.objective import objective_for
from cptq.calibration.probe import Probe
from cptq.calibration.slices import Rows
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.numerics.grid import dequantize_layer
from cptq.report.words import number
from cptq.types import CompressedLayer, Emit, Event, Notice, Plan, Progress

Compress = Callable[[Plan, Emit], list[CompressedLayer]]


@dataclass(kw_only=True, eq=False)
class _Outcome:
    """One plan carried out: its layers, what was said on the way, how far the model moved."""

    plan: Plan
    layers: list[CompressedLayer]
    said: list[Event]
    rows: Tensor

    @property
    def divergence(self) -> float:
        return float(self.rows.mean())


def ship_the_better(
    model: LoadedModel,
    plan: Plan,
    rival: Plan,
    compress: Compress,
    text: Sequence[Rows],
    emit: Emit,
) -> tuple[Plan, list[CompressedLayer]]:
    """Carry out both plans; afterwards `model` computes with the layers that are returned.

    Args:
        model: dense.
        plan: the mixed plan; at equal divergence it is shipped.
        rival: the plan that asked no score.
        compress: carries a plan out on the dense model, whose weights it changes.
        text: batches to judge on.
        emit: hears of the winner's notices only, and of the verdict.
    """
    objective = objective_for(model.kind, model.config)
    probe = Probe(model, text, objective)
    dense = _weights(model)
    other = _carry_out(rival, compress, probe, emit)
    for name, W_OI in dense.items():
        set_weight(model.linear(name), W_OI)
    own = _carry_out(plan, compress, probe, emit)
    better = own if own.divergence <= other.divergence else other
    if better is other:
        for name, W_OI in dense.items():
            set_weight(model.linear(name), W_OI)
        for layer in other.layers:
            set_weight(model.linear(layer.spec.name), dequantize_layer(layer, model.dtype))
    for event in better.said:
        emit(event)
    note = _verdict(own, other, objective.unit, probe.tokens)
    emit(note)
    return replace(better.plan, notes=(*better.plan.notes, note.message)), better.layers


def _weights(model: LoadedModel) -> dict[str, Tensor]:
    return {
        spec.name: get_weight(model.linear(spec.name)).clone()
        for unit in model.units
        for spec in unit.layers
    }


@torch.no_grad()
def _carry_out(plan: Plan, compress: Compress, probe: Probe, emit: Emit) -> _Outcome:
    said: list[Event] = []

    def hear(event: Event) -> None:
        if isinstance(event, Progress):
            emit(replace(event, stage=f"{event.stage} {plan.allocator}"))
        else:
            said.append(event)

    layers = compress(plan, hear)
    return _Outcome(plan=plan, layers=layers, said=said, rows=probe.rows_now())


def _verdict(own: _Outcome, other: _Outcome, unit: str, tokens: int) -> Notice:
    labels = {candidate.label for candidate in other.plan.choices.values()}
    rival = f"uniform {labels.pop()}" if len(labels) == 1 else "two widths spread evenly"
    gap = own.rows - other.rows
    error = float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
    numbers = (
        f"{number(own.divergence)} against {number(other.divergence)} {unit} "
        f"(difference {float(gap.mean()):+.3g} ± {error:.2g}, {tokens:,} tokens)"
    )
    if own.divergence <= other.divergence:
        message = f"the mixed plan is kept: {numbers} of {rival} at the same bytes"
        return Notice(kind="info", subject="--check-uniform", message=message)
    message = f"the mixed plan loses to {rival} at the same bytes, {numbers}: the latter is shipped"
    return Notice(kind="warning", subject="--check-uniform", message=message)
