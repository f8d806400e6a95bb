"""Build a trial model: units compressed one by one on the activations of the dense model."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cptq.calibration.objective import Objective
from cptq.calibration.samples import SampleRequest, collect_samples
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression import WITHOUT_ACTIVATIONS
from cptq.compression.trial_model import TrialModel
from cptq.layouts import Layout
from cptq.types import Emit, Notice

#: bytes that the Hessians of all units together may take
HESSIAN_BYTES = 8 << 30


def build_trial_model(
    model: LoadedModel,
    calibration: Calibration,
    objective: Objective,
    compressor: str,
    *,
    layout: Layout,
    float16_scales: bool,
    sparse: bool = False,
    seed: int,
    emit: Emit,
) -> TrialModel:
    """Build a trial model for `compressor`; where that uses activations, one pass gathers them.

    `layout` and `float16_scales` are those of the file and the runtime that the weights are meant
    for. `sparse`: sparse candidates will be tried, whose masks use activations as well.
    """
    build = partial(TrialModel, layout=layout, float16_scales=float16_scales)
    if compressor in WITHOUT_ACTIVATIONS and not sparse:
        return build(model, compressor, emit)
    need = sum(4 * unit.layers[0].shape[1] ** 2 for unit in model.units)
    if need > HESSIAN_BYTES:
        message = (
            f"the Hessians of all units would take {need / 2**30:.0f} GiB: units are compared as "
            "if their inputs were independent"
        )
        emit(Notice(kind="fallback", subject=compressor, message=message))
        return build(model, compressor, emit)
    request = SampleRequest(moments=True)
    samples = collect_samples(
        model, calibration.batches, objective, request, seed=seed, emit=emit, keep=1
    )
    hessians: dict[str, Tensor] = {}
    for unit in model.units:
        sample = samples.layers.get(unit.layers[0].name)
        if sample is not None and sample.moment is not None:
            hessians[unit.name] = sample.moment.mean_II
        else:
            message = "too wide for a Hessian here: compared as if its inputs were independent"
            emit(Notice(kind="fallback", subject=unit.name, message=message))
    return build(model, compressor, emit, hessians)
