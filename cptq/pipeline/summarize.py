"""What a report says about a run, gathered from what the stages know."""

from __future__ import annotations

import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cptq import __version__
from cptq.allocation.cost import CostModel
from cptq.artifact.reload import ReloadCheck
from cptq.checkpoint.model import LoadedModel
from cptq.config import Settings, command_line, describe
from cptq.pipeline.recorder import Recorder
from cptq.report.summary import ModelFacts, Summary, VerificationFacts

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "tokenizers", "scipy")


def collect_versions() -> dict[str, str]:
    """Versions of cptq, Python and the packages that numbers depend on."""
    found = {"cptq": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def describe_model(model: LoadedModel) -> ModelFacts:
    """The model as a report names it; `dense_bytes` is its file at 16 bits a weight."""
    dtypes = Counter[str]()
    for spec in model.tensors:
        dtypes[spec.dtype] += spec.numel
    return ModelFacts(
        source=model.source,
        kind=model.kind,
        family=model.family,
        parameters=model.parameters,
        dense_bytes=CostModel(model.units, model.tensors).dense_file_bytes,
        fingerprint=model.fingerprint,
        blocks=len(model.block_names),
        dtype=dtypes.most_common(1)[0][0],
        quantized=model.quantized,
    )


def summarize(
    command: str, settings: Settings, model: LoadedModel, recorder: Recorder, **found: Any
) -> Summary:
    """A summary of `command`; `found` fills the fields that this command has."""
    return Summary(
        command=command,
        command_line=command_line(settings),
        model=describe_model(model),
        versions=collect_versions(),
        settings=describe(settings),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        layers=model.layers,
        units=model.all_units,
        notices=tuple(recorder.notices),
        timings=dict(recorder.timings),
        **found,
    )


def describe_check(found: ReloadCheck | None) -> VerificationFacts | None:
    """Return what the reload check found, in the form of the report."""
    if found is None:
        return None
    return VerificationFacts(
        missing=found.missing,
        unexpected=found.unexpected,
        mismatched=found.mismatched,
        max_abs_difference=found.max_abs_difference,
        seconds=found.seconds,
    )
