"""Build a trial model: units compressed one by one on the activations of the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cptq.allocation.cost import CostModel
from cptq.calibration.batches import split_batches
from cptq.calibration.samples import SamplePass, Samples, sample_moments, take_batches
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression import WITHOUT_ACTIVATIONS
from cptq.compression.scores import USUAL_MASKING, Masking
from cptq.compression.streams import measure_head_moment, take_share
from cptq.compression.trial_model import TrialModel
from cptq.compression.vocabulary import is_head
from cptq.types import Candidate, Emit, Notice, Progress, Unit

#: tokens whose second moment stands for all where a head is tried
HEAD_TOKENS = 4096
#: bytes that the Hessians of all units together may take
HESSIAN_BYTES = 8 << 30


def build_trial_model(
    model: LoadedModel,
    calibration: Calibration,
    compressor: str,
    cost: CostModel,
    candidates: Iterable[Candidate],
    *,
    seed: int,
    blocks: bool = True,
    masking: Masking = USUAL_MASKING,
    emit: Emit,
) -> TrialModel:
    """Build a trial model for `compressor`; where that uses activations, one pass gathers them.

    Without `blocks` only the vocabulary is to be tried: the blocks' activations are not gathered,
    and those of a head when it is tried, unless another pass has given them.

    All of the calibration text goes into the Hessians, as in the final compression: from fewer
    tokens wide units look more sensitive than they are. `cost` knows the file and the runtime that
    the weights are meant for. `candidates` may be tried; the masks of sparse ones use activations
    with any compressor.
    """
    layout, float16_scales = cost.layout, cost.runtime.float16_scales
    build = partial(TrialModel, layout=layout, float16_scales=float16_scales, masking=masking)
    sparse = any(candidate.sparsity for candidate in candidates)
    if compressor in WITHOUT_ACTIVATIONS and not sparse:
        return build(model, compressor, emit)
    measure_heads = partial(_measure_heads, model, calibration, emit)
    if not blocks:
        return build(model, compressor, emit, measure_heads=measure_heads)
    heads = measure_heads()
    need = sum(4 * unit.layers[0].shape[1] ** 2 for unit in model.units)
    if need > HESSIAN_BYTES:
        message = (
            f"the Hessians of all units would take {need / 2**30:.0f} GiB: units are compared as "
            "if their inputs were independent"
        )
        emit(Notice(kind="fallback", subject=compressor, message=message))
        return build(model, compressor, emit, heads)
    hessians = _measure_units(model, calibration, compressor, seed, emit)
    return build(model, compressor, emit, heads | hessians)


@torch.no_grad()
def solve_choices(
    model: LoadedModel,
    calibration: Calibration,
    compressor: str,
    cost: CostModel,
    choices: Sequence[Mapping[str, Candidate]],
    *,
    seed: int,
    masking: Masking = USUAL_MASKING,
    emit: Emit,
) -> TrialModel:
    """Build a trial model in which all that some choices give the units is compressed already,
    where that takes activations.

    One pass over the text, block by block: a block's second moments are gone when its units are
    compressed.

    Args:
        model: dense.
        calibration: the text, all of which the pass takes.
        compressor: a name of `COMPRESSORS`.
        cost: knows the file and the runtime that the weights are meant for.
        choices: {unit: candidate} each.
        seed: of masks that are drawn by lot.
        masking: how the weights that a sparse candidate keeps are chosen.
        emit: receives progress.
    """
    asked = {
        name: sorted({choice[name] for choice in choices if not choice[name].dense})
        for name in choices[0]
    }
    trial = TrialModel(
        model,
        compressor,
        emit,
        layout=cost.layout,
        float16_scales=cost.runtime.float16_scales,
        masking=masking,
    )
    sparse = any(candidate.sparsity for found in asked.values() for candidate in found)
    if compressor in WITHOUT_ACTIVATIONS and not sparse:
        return trial  # a unit needs nothing but its weights, when it is tried
    widest = max(unit.layers[0].shape[1] for unit in model.units)
    sampling = sample_moments(model, calibration, seed=seed, emit=emit, features=widest)
    blocks = len(model.block_names)
    for done, samples in enumerate(sampling, 1):
        for unit in samples.units:
            trial.solve(unit, _take_moment(samples, unit), asked.get(unit.name, ()))
        emit(Progress(stage="trial", done=done, total=blocks))
    for unit in (unit for unit in cost.units if unit.block is None):
        some = asked[unit.name]
        H_II = _measure_passed_head(model, sampling) if some and is_head(unit) else None
        trial.solve(unit, H_II, some)
    sampling.drop_states()
    return trial


def _take_moment(samples: Samples, unit: Unit) -> Tensor | None:
    """Return the second moment of a unit's inputs; None where none were kept, or it never ran."""
    sample = samples.layers.get(unit.layers[0].name)
    return None if sample is None or sample.moment is None else sample.moment.mean_II


def _measure_passed_head(model: LoadedModel, sampling: SamplePass) -> Tensor:
    """Return the second moment of what the head is given at the end of a pass that has been run."""
    order = take_share(sampling.batches).indices  # a measurement takes them in an order of its own
    return measure_head_moment(model, sampling.batches, lambda place: sampling.finish(order[place]))


def _measure_units(
    model: LoadedModel, calibration: Calibration, compressor: str, seed: int, emit: Emit
) -> dict[str, Tensor]:
    """Return {unit: second moment of its inputs over all of the text}."""
    sampling = sample_moments(model, calibration, seed=seed, emit=emit)
    hessians: dict[str, Tensor] = {}
    blocks = len(model.block_names)
    emit(Progress(stage="samples", done=0, total=blocks, message=f"{sampling.tokens:,} tokens"))
    for done, samples in enumerate(sampling, 1):
        for unit in samples.units:
            H_II = _take_moment(samples, unit)
            if H_II is not None:
                hessians[unit.name] = H_II
            else:
                message = (
                    "too wide for a Hessian here, or never run: compared as if its inputs were "
                    "independent"
                )
                emit(Notice(kind="fallback", subject=unit.name, message=message))
        emit(Progress(stage="samples", done=done, total=blocks))
    return hessians


def _measure_heads(model: LoadedModel, calibration: Calibration, emit: Emit) -> dict[str, Tensor]:
    """Return {unit: second moment of what the output head is given}; empty without a head."""
    heads = [unit for unit in model.vocabulary if is_head(unit)]
    if not heads:
        return {}
    some = take_batches(split_batches(calibration.batches), HEAD_TOKENS)
    done = Progress(stage="samples", done=0, total=1, message=f"inputs of {heads[0].name}")
    emit(done)
    found = {heads[0].name: measure_head_moment(model, some)}
    emit(replace(done, done=1))
    return found
