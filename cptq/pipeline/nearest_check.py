"""Whether a compressor's model is worse than what nearest rounding would give: then say so.

A compressor that uses activations, such as GPTQ, can do harm: where the calibration text is unlike
what the model reads, is too short for the second moments, or where the activations it was given are
not those that the model computes. Nearest rounding needs none of these. So both are compared, at
the same plan, by their divergence from the dense model on held-out text (`GUARD_TOKENS`); the
matrices of the vocabulary are alike in both.

Cost: three forward passes of a few hundred tokens, two where the dense model has run them before,
and one rounding of all weights. Limits: it finds gross damage, not a difference within `ERRORS`
standard errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.calibration.samples import take_batches
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_stored_weight, make_weight
from cptq.compression import COMPRESSORS, WITHOUT_ACTIVATIONS
from cptq.compression.layer import compress_layer
from cptq.compression.restored import restore_layers
from cptq.layouts import Layout
from cptq.numerics.grid import dequantize_layer
from cptq.numerics.standard_error import compute_standard_error
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
from cptq.report.formatting import format_number
from cptq.types import Candidate, CompressedLayer, Emit, LayerSpec, Notice, Plan

NEAREST = "nearest"
#: tokens of held-out text that are run
GUARD_TOKENS = 1024
#: standard errors, and share of nearest rounding's divergence, that a difference must exceed
ERRORS, SHARE = 2.0, 0.05


@torch.no_grad()
def check_against_nearest(
    inputs: CompressInputs,
    plan: Plan,
    layers: Sequence[CompressedLayer],
    recorder: Recorder,
    dense: DivergenceFromDense | None = None,
) -> None:
    """Say where a run's compressor does harm; nothing where no text is left to tell.

    `dense`: the divergence on `inputs.held_out.judge`, where it was recorded before.
    """
    held_out, compressor = inputs.held_out.judge, inputs.settings.compressor
    if compressor in WITHOUT_ACTIVATIONS or not held_out:
        return
    with recorder.stage("comparison with nearest rounding"):
        warn_if_worse_than_nearest(
            inputs.model,
            layers,
            plan.choices,
            compressor,
            held_out,
            layout=inputs.space.layout,
            float16_scales=inputs.runtime.float16_scales,
            emit=recorder,
            dense=dense,
        )


@torch.no_grad()
def warn_if_worse_than_nearest(
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    choices: Mapping[str, Candidate],
    compressor: str,
    held_out: Sequence[Batch],
    *,
    layout: Layout,
    float16_scales: bool,
    emit: Emit,
    dense: DivergenceFromDense | None = None,
) -> None:
    """Compare the model, which computes with `layers` and does so afterwards, with rounded ones.

    Args:
        model: with the weights of the checkpoint beside those that were set.
        layers: what the compressor made of it.
        choices: the plan, {unit: candidate}.
        compressor: its name, for the message.
        held_out: text that did not calibrate.
        layout: how layers are stored.
        float16_scales: as they were compressed.
        emit: receives a warning where the compressor's model is the worse one.
        dense: the divergence on `held_out`, recorded while the model was dense.
    """
    if dense is None:
        objective = choose_objective(model.kind, model.config)
        model.restore_dense()
        rows = take_batches(held_out, GUARD_TOKENS)
        dense = DivergenceFromDense(model, rows, objective, units=False)
        restore_layers(model, layers)
    divergence = dense.take_part(GUARD_TOKENS)
    own_R = divergence.measure_rows()
    for spec, candidate in _list_rounded(model, choices):
        rounded = partial(_round, model, spec, candidate, layout, float16_scales)
        make_weight(model.linear(spec.name), rounded)
    nearest_R = divergence.measure_rows()
    restore_layers(model, layers)
    gap, least = float((own_R - nearest_R).mean()), SHARE * float(nearest_R.mean())
    error = compute_standard_error(own_R - nearest_R, divergence.window_R)
    if gap > max(ERRORS * error, least):
        message = (
            f"on held-out text it is worse than nearest rounding at the same plan: "
            f"{format_number(float(own_R.mean()))} against {format_number(float(nearest_R.mean()))}"
            f" {divergence.unit} ({divergence.describe_difference(own_R - nearest_R)}); use "
            "--compressor nearest, or --calibration text like what the model will read"
        )
        emit(Notice(kind="warning", subject=f"--compressor {compressor}", message=message))


def _list_rounded(
    model: LoadedModel, choices: Mapping[str, Candidate]
) -> Iterable[tuple[LayerSpec, Candidate]]:
    for unit in model.units:
        if not choices[unit.name].dense:
            yield from ((spec, choices[unit.name]) for spec in unit.layers)


def _round(
    model: LoadedModel, spec: LayerSpec, candidate: Candidate, layout: Layout, float16_scales: bool
) -> Tensor:
    """Return the weight W_OI of a layer, rounded to the nearest codes."""
    layer = compress_layer(
        spec,
        get_stored_weight(model.linear(spec.name)).float(),
        None,
        candidate,
        COMPRESSORS.get(NEAREST),
        layout,
        float16_scales=float16_scales,
        measure_output=False,
    )
    return dequantize_layer(layer, model.dtype)
