"""What `analyze` and `compress` begin with: a dense model, its calibration, its candidates."""

from __future__ import annotations

from collections.abc import Collection

from cptq.calibration.judges import part_rows
from cptq.calibration.tokens import Calibration, build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import AnalyzeSettings, CompressSettings, ModelSettings
from cptq.errors import ModelError
from cptq.pipeline.recorder import Recorder
from cptq.types import Candidate


def load_dense(settings: ModelSettings, recorder: Recorder, *, conv1d: bool = False) -> LoadedModel:
    """Load a model that is not compressed yet; `conv1d` as in `load_model`.

    Raises:
        ModelError: it is, or cannot be loaded.
    """
    with recorder.stage("load"):
        model = load_model(settings, recorder, conv1d=conv1d)
    if model.quantized:
        raise ModelError(
            f"{model.source} is compressed already",
            allowed="a dense checkpoint",
            hint="compress the model that it was made from; cptq eval takes artifacts",
        )
    return model


def calibrate(
    model: LoadedModel,
    settings: AnalyzeSettings | CompressSettings,
    recorder: Recorder,
    *,
    judging: int = 0,
    reserve: bool = True,
) -> Calibration:
    """The calibration text as the model's own tokens, and rows for `judging` parts beside it.

    `reserve`: where text is short, fewer samples calibrate, so that some are left to judge.
    """
    with recorder.stage("calibration"):
        spare = judging * part_rows(model)
        return build_calibration(
            model, settings.calibration, settings.model, recorder, spare=spare, reserve=reserve
        )


def candidates(
    bits: tuple[int, ...], group_size: int, *, asymmetric: Collection[int] = ()
) -> tuple[Candidate, ...]:
    """One candidate per width, fewest bits first, `asymmetric` those on asymmetric grids; 16 keeps
    a unit dense."""
    return tuple(
        Candidate(bits=16)
        if width == 16
        else Candidate(bits=width, group_size=group_size, symmetric=width not in asymmetric)
        for width in sorted(set(bits))
    )
