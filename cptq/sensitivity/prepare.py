"""Check the input and prepare the shared passes, before the first unit is scored.

    calibration rows -> fit | held out
    fit      -> samples of every linear (inputs, gradients)  for cca, taylor, output
             -> gradients on the path to Q(W)                for taylor-quantized, delta-loss ...
    held out -> dense outputs, to measure divergences from   for pruning, linearity, kl ...

Metrics of the weights alone need no pass and no text.
"""

from __future__ import annotations

from collections.abc import Mapping

from cptq.calibration.batches import (
    Split,
    choose_held_out_tokens,
    count_tokens,
    select_gradient_rows,
    split_held_out,
)
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.calibration.recorder import SampleRequest
from cptq.calibration.samples import SamplePass, sample_blocks
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError, ModelError
from cptq.sensitivity.metric import Compress, Context, Metric
from cptq.sensitivity.path_metric import PATH_TOKENS, PathGradients, compute_path_gradients
from cptq.sensitivity.rounding import NearestRounding
from cptq.types import Candidate, Emit, Keep, Notice, keep_nothing

Kinds = Mapping[str, type[Metric]]


def check_units(model: LoadedModel) -> None:
    """Raise ModelError if there is nothing to compress."""
    if not model.units:
        conv1d = any(spec.kind == "conv1d" for spec in model.layers)
        raise ModelError(
            f"{model.source} has no layer that can be compressed",
            allowed=None if conv1d else "models whose blocks hold linear layers",
            hint="its layers are Conv1D, which --runtime cptq packs" if conv1d else None,
        )


def prepare_context(
    model: LoadedModel,
    kinds: Kinds,
    calibration: Calibration | None,
    candidates: tuple[Candidate, ...],
    seed: int,
    emit: Emit,
    compress: Compress | None = None,
    *,
    outer: bool = False,
    keep: Keep = keep_nothing,
) -> Context:
    """Prepare the shared passes that these metrics need: that of the samples runs while units are
    scored, the others run here.

    `outer`: units outside the blocks are scored, by their measured divergence. `keep` keeps the
    gradients at each point of the path.

    Raises:
        CalibrationError: no text, too few tokens for a metric, or NaN or infinity in a pass.
    """
    objective = choose_objective(model.kind, model.config)
    rounding = NearestRounding()
    samples = divergence = path = None
    if any(kind.needs.text for kind in kinds.values()):
        split = _split_text(model, kinds, calibration)
        samples = _prepare_samples(model, kinds, split, seed, emit, head=outer)
        if outer or any(kind.needs.divergence for kind in kinds.values()):
            divergence = DivergenceFromDense(model, split.held_out, objective, emit)
        if samples and divergence and split.overlap:
            message = "too little text to exclude the held-out rows from the sampled ones"
            emit(Notice(kind="info", subject="sensitivity samples", message=message))
        path = _compute_path_gradients(model, kinds, split, rounding, candidates, emit, keep)
    return Context(
        model=model,
        objective=objective,
        samples=samples,
        divergence=divergence,
        path=path,
        rounding=rounding,
        candidates=candidates,
        calibration_tokens=calibration.record.tokens if calibration else 0,
        compress=compress,
        seed=seed,
        emit=emit,
        keep=keep,
    )


def _split_text(model: LoadedModel, kinds: Kinds, calibration: Calibration | None) -> Split:
    readers = [name for name, kind in kinds.items() if kind.needs.text]
    if calibration is None:
        raise CalibrationError(
            f"metric {readers[0]!r} needs calibration text, but there is none",
            hint="metrics of the weights alone need none: pq-index, kurtosis, effective-rank",
        )
    held_out = choose_held_out_tokens(model.parameters, model.device.type == "cpu")
    split = split_held_out(calibration.batches, model.kind, held_out)
    tokens = count_tokens(split.fit)
    for name in readers:
        least = kinds[name].get_min_tokens(model)
        if tokens < least:
            raise CalibrationError(
                f"metric {name!r} needs at least {least} calibration tokens, there are {tokens}",
                hint="pass larger --samples or --seqlen, or a longer text",
            )
    return split


def _prepare_samples(
    model: LoadedModel, kinds: Kinds, split: Split, seed: int, emit: Emit, *, head: bool
) -> SamplePass | None:
    requests = [kind.needs.samples for kind in kinds.values() if kind.needs.samples is not None]
    if not requests:
        return None
    combined = SampleRequest()
    for request in requests:
        combined = combined | request
    objective = choose_objective(model.kind, model.config)
    least = max(kind.get_min_tokens(model) for kind in kinds.values())
    return sample_blocks(
        model, split.fit, objective, combined, seed=seed, emit=emit, least=least, head=head
    )


def _compute_path_gradients(
    model: LoadedModel,
    kinds: Kinds,
    split: Split,
    rounding: NearestRounding,
    candidates: tuple[Candidate, ...],
    emit: Emit,
    keep: Keep,
) -> PathGradients | None:
    points = sorted({point for kind in kinds.values() for point in kind.needs.path})
    if not points:
        return None
    return compute_path_gradients(
        model,
        select_gradient_rows(split.fit, model.kind, PATH_TOKENS),
        choose_objective(model.kind, model.config),
        rounding,
        candidates=candidates,
        points=points,
        emit=emit,
        keep=keep,
    )
