"""What must stand before the first unit is scored: checks of the input, and the shared passes.

    calibration rows -> fit | held out
    fit      -> samples of every linear (inputs, gradients)  for cca, taylor, output
             -> gradients on the way to Q(W)                 for taylor-quantized, delta-loss ...
    held out -> probe                                        for pruning, linearity, kl ...

Metrics that look at weights alone need none of it, and no text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cptq.calibration.objective import objective_for
from cptq.calibration.probe import Probe
from cptq.calibration.samples import Samples, Wants, collect_samples
from cptq.calibration.slices import (
    Split,
    gradient_rows,
    held_out_tokens,
    split_held_out,
    token_count,
)
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError, ModelError
from cptq.sensitivity.metric import Context, Metric
from cptq.sensitivity.path import PATH_TOKENS, PathGradients, path_gradients
from cptq.sensitivity.rounding import Rounding
from cptq.types import Candidate, Emit, Notice

Kinds = Mapping[str, type[Metric]]


def check_model(model: LoadedModel) -> None:
    """Raises ModelError where there is nothing to compress, or a weight is NaN or infinite."""
    check_units(model)
    for unit in model.units:
        for layer in unit.layers:
            if not bool(torch.isfinite(get_weight(model.linear(layer.name))).all()):
                raise ModelError(
                    f"{layer.weight_name} holds NaN or infinity",
                    hint="the checkpoint is damaged: download or save it again",
                )


def check_units(model: LoadedModel) -> None:
    """Raises ModelError where there is nothing to compress."""
    if not model.units:
        conv1d = any(spec.kind == "conv1d" for spec in model.layers)
        raise ModelError(
            f"{model.source} has no layer that can be compressed",
            hint="its layers are Conv1D, which --runtime cptq packs" if conv1d else None,
        )


def prepare(
    model: LoadedModel,
    kinds: Kinds,
    calibration: Calibration | None,
    candidates: tuple[Candidate, ...],
    seed: int,
    emit: Emit,
) -> Context:
    """The shared passes that these metrics need.

    Raises:
        CalibrationError: no text, too few tokens for a metric, or NaN or infinity on the way.
    """
    objective = objective_for(model.kind, model.config)
    rounding = Rounding()
    samples = probe = path = None
    if any(kind.needs.text for kind in kinds.values()):
        split = _split(model, kinds, calibration)
        samples = _samples(model, kinds, split, seed, emit)
        if any(kind.needs.probe for kind in kinds.values()):
            probe = Probe(model, split.held_out, objective, emit)
        if samples and probe and split.overlap:
            message = "too little text to keep the held-out rows out of the sampled ones"
            emit(Notice(kind="info", subject="sensitivity samples", message=message))
        path = _path(model, kinds, split, rounding, candidates, emit)
    return Context(
        model=model,
        objective=objective,
        samples=samples,
        probe=probe,
        path=path,
        rounding=rounding,
        candidates=candidates,
        calibration_tokens=calibration.record.tokens if calibration else 0,
        seed=seed,
        emit=emit,
    )


def _split(model: LoadedModel, kinds: Kinds, calibration: Calibration | None) -> Split:
    readers = [name for name, kind in kinds.items() if kind.needs.text]
    if calibration is None:
        raise CalibrationError(
            f"metric {readers[0]!r} needs calibration text, and there is none",
            hint="metrics of the weights alone need none: pq-index, kurtosis, effective-rank",
        )
    held_out = held_out_tokens(model.parameters, model.device.type == "cpu")
    split = split_held_out(calibration.batches, model.kind, held_out)
    tokens = token_count(split.fit)
    for name in readers:
        least = kinds[name].least_tokens(model)
        if tokens < least:
            raise CalibrationError(
                f"metric {name!r} needs at least {least} calibration tokens, there are {tokens}",
                hint="pass larger --samples or --seqlen, or a longer text",
            )
    return split


def _samples(
    model: LoadedModel, kinds: Kinds, split: Split, seed: int, emit: Emit
) -> Samples | None:
    wanted = [kind.needs.samples for kind in kinds.values() if kind.needs.samples is not None]
    if not wanted:
        return None
    wants = Wants()
    for want in wanted:
        wants = wants | want
    objective = objective_for(model.kind, model.config)
    least = max(kind.least_tokens(model) for kind in kinds.values())
    return collect_samples(model, split.fit, objective, wants, seed=seed, emit=emit, least=least)


def _path(
    model: LoadedModel,
    kinds: Kinds,
    split: Split,
    rounding: Rounding,
    candidates: tuple[Candidate, ...],
    emit: Emit,
) -> PathGradients | None:
    places = sorted({place for kind in kinds.values() for place in kind.needs.path})
    if not places:
        return None
    return path_gradients(
        model,
        gradient_rows(split.fit, model.kind, PATH_TOKENS),
        objective_for(model.kind, model.config),
        rounding,
        candidates=candidates,
        places=places,
        emit=emit,
    )
