"""`compress --tune`: tune what was compressed, and say what that brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import Objective, choose_objective
from cptq.checkpoint.model import LoadedModel
from cptq.compression.restored import restore_layers
from cptq.compression.tune import (
    STEP_TOKENS,
    STEPS,
    Tuned,
    copy_dense,
    list_steps,
    measure_errors,
    tune,
)
from cptq.compression.tuned_parts import find_free_vectors
from cptq.pipeline.inputs import CompressInputs
from cptq.report.formatting import format_number
from cptq.types import CompressedLayer, Emit, LayerResult, Notice

SUBJECT = "--tune"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseRecord:
    """The model before it was compressed, and what measures the divergence from it.

    `judge` is None where there is no second text that is held out.
    """

    model: LoadedModel
    objective: Objective
    choose: DivergenceFromDense
    judge: DivergenceFromDense | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TuneResult:
    """What --tune changed.

    `layers` are those of the compressed linears, {name: (scale, result)}; codes stay. `vectors` are
    norms and biases, {name: value}. `record` is what the manifest says. None of it: nothing.
    """

    layers: Mapping[str, tuple[Tensor, LayerResult]] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; `TuneResult(**fields)` is the inverse."""
        return {"layers": self.layers, "vectors": self.vectors, "record": self.record}


def record_dense(inputs: CompressInputs, judge: DivergenceFromDense | None) -> DenseRecord:
    """Copy the dense weights, and run the text that chooses through the dense model.

    `judge`: the divergence from the dense model on the text that judges; None: there is none.
    """
    model, text = inputs.model, inputs.held_out
    objective = choose_objective(model.kind, model.config)
    return DenseRecord(
        model=copy_dense(model),
        objective=objective,
        choose=DivergenceFromDense(model, text.tune, objective, units=False),
        judge=judge,
    )


def tune_layers(
    inputs: CompressInputs,
    layers: Sequence[CompressedLayer],
    dense: DenseRecord,
    held_out: Sequence[Batch],
    emit: Emit,
) -> TuneResult:
    """Tune the compressed linears in place, with norms and biases; embeddings stay as they are.

    Args:
        inputs: what is compressed; its model computes with the layers.
        layers: all compressed layers.
        dense: from before anything was compressed.
        held_out: text on which the errors of the tuned layers are measured.
        emit: receives progress and the result.

    Returns:
        What has changed, for `apply_tuned`.
    """
    linears = [layer for layer in layers if layer.spec.kind in ("linear", "conv1d")]
    if not linears:
        message = "the plan keeps every linear dense: nothing to tune"
        emit(Notice(kind="warning", subject=SUBJECT, message=message))
        return TuneResult()
    model, settings = inputs.model, inputs.settings
    found = tune(
        model,
        dense.model,
        linears,
        list_steps(model, inputs.calibration),
        dense.objective,
        dense.choose,
        dense.judge,
        float16_scales=inputs.runtime.float16_scales,
        steps=STEPS,
        seconds=60 * settings.tune_minutes,
        seed=settings.calibration.seed,
        emit=emit,
    )
    judge = dense.judge or dense.choose
    _report(found, judge, settings.tune_minutes, emit)
    if not found.kept:
        return TuneResult()
    tuned = measure_errors(model, dense.model, found.layers, held_out)
    vectors = find_free_vectors(model)
    return TuneResult(
        layers={layer.spec.name: (layer.scale, layer.result) for layer in tuned},
        vectors={name: vectors[name].detach() for name in found.dense},
        record=_record(found, judge),
    )


@torch.no_grad()
def apply_tuned(
    model: LoadedModel, layers: Sequence[CompressedLayer], found: TuneResult
) -> list[CompressedLayer]:
    """Let a model that computes with the layers compute as it was tuned; return all layers."""
    changed = []
    for layer in layers:
        scale, result = found.layers.get(layer.spec.name, (layer.scale, layer.result))
        changed.append(replace(layer, scale=scale.to(layer.scale.device), result=result))
    restore_layers(model, [layer for layer in changed if layer.spec.name in found.layers])
    vectors = find_free_vectors(model)
    for name, value in found.vectors.items():
        vectors[name].copy_(value)
    return changed


def _report(found: Tuned, judge: DivergenceFromDense, minutes: int, emit: Emit) -> None:
    if not found.in_time:
        message = (
            f"{found.steps} of {found.planned} steps fitted into {minutes} minutes: another run "
            "may make more or fewer, and write other bytes; a larger --tune-minutes allows all"
        )
        emit(Notice(kind="warning", subject=SUBJECT, message=message))
    before, after = float(found.before.mean()), float(found.after.mean())
    numbers = (
        f"{format_number(before)} to {format_number(after)} {judge.unit} "
        f"({judge.describe_difference(found.after - found.before)})"
    )
    if found.kept:
        message = (
            f"the divergence from the dense model fell from {numbers} on held-out text in "
            f"{found.steps} steps; the scales of {len(found.layers)} matrices and "
            f"{len(found.dense)} norms and biases changed"
        )
        emit(Notice(kind="info", subject=SUBJECT, message=message))
    else:
        message = (
            f"no better state was found in {found.steps} steps: the best one changed the "
            f"divergence on held-out text from {numbers}; the model is left as it was rounded"
        )
        emit(Notice(kind="warning", subject=SUBJECT, message=message))


def _record(found: Tuned, judge: DivergenceFromDense) -> dict[str, Any]:
    """Return what was done as plain data."""
    return {
        "steps": found.steps,
        "tokens_per_step": STEP_TOKENS,
        "before": float(found.before.mean()),
        "after": float(found.after.mean()),
        "unit": judge.unit,
        "dense_tensors": list(found.dense),
    }
