"""What `analyze` and `compress` begin with: a dense model, its calibration, its candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cptq.allocation.cost import CostModel
from cptq.artifact.formats import FORMATS
from cptq.calibration.judges import part_rows
from cptq.calibration.tokens import Calibration, build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import (
    AnalyzeSettings,
    CompressSettings,
    ModelSettings,
    find_runtime,
    parse_sparsity,
)
from cptq.errors import ModelError
from cptq.pipeline.recorder import Recorder
from cptq.types import Candidate


def load_dense(settings: ModelSettings, recorder: Recorder, *, conv1d: bool = False) -> LoadedModel:
    """Load a model that is not compressed yet; `conv1d` as in `load_model`.

    Raises:
        ModelError: it is, or cannot be loaded.
    """
    with recorder.stage("load"):
        model = load_model(settings, recorder, conv1d=conv1d, experts=True)
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


def cost_model(model: LoadedModel, settings: AnalyzeSettings) -> CostModel:
    """Bytes of the units' weights in the file that the runtime loads."""
    runtime = find_runtime(settings.runtime)
    form = runtime.format_for(model.layers, asymmetric=settings.asymmetric)
    return CostModel(model.units, model.tensors, FORMATS.get(form).layout, runtime)


def asymmetric_widths(settings: AnalyzeSettings | CompressSettings) -> tuple[int, ...]:
    """The widths that --asymmetric puts on asymmetric grids: those that the runtime takes so."""
    return find_runtime(settings.runtime).asymmetric if settings.asymmetric else ()


def asked_for(settings: AnalyzeSettings | CompressSettings) -> tuple[Candidate, ...]:
    """The candidates that the options name."""
    return candidates(
        settings.bits,
        settings.group_size,
        asymmetric=asymmetric_widths(settings),
        sparsity=settings.sparsity,
    )


def candidates(
    bits: Sequence[int],
    group_size: int,
    *,
    asymmetric: Collection[int] = (),
    sparsity: Sequence[str] = (),
) -> tuple[Candidate, ...]:
    """Ways to store a unit, fewest bits first, each width dense and then at every sparsity.

    The widths in `asymmetric` lie on asymmetric grids; 16 bits keep a unit as it is.
    """
    kinds = [(0.0, "none"), *map(parse_sparsity, sparsity)]
    return tuple(
        Candidate(bits=16)
        if width == 16
        else Candidate(
            bits=width,
            group_size=group_size,
            symmetric=width not in asymmetric,
            sparsity=share,
            pattern=pattern,
        )
        for width in sorted(set(bits))
        for share, pattern in (kinds if width < 16 else kinds[:1])
    )
