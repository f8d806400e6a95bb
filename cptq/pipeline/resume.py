"""What tells one run of `cptq analyze` or `cptq compress` from another, and how it is resumed.

`identify` says what a run is before anything is loaded, `identify_inputs` and `identify_compress`
once model and text are there: whatever can change a byte of the output. The processes that share a
run must agree in it, and their number is no part of it. `keep_blocks` keeps a plan that is carried
out block by block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from typing import TypeVar

from cptq import __version__
from cptq.artifact.atomic import refuse_existing
from cptq.artifact.manifest import MANIFEST
from cptq.calibration.batches import Batch
from cptq.calibration.tokens import Calibration, digest_tokens
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.ranks import Ranks
from cptq.compression.blockwise import Steps
from cptq.config import AnalyzeSettings, CompressSettings, spell_options
from cptq.errors import UsageError
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import RunDirectory, open_run
from cptq.types import (
    CompressedLayer,
    Emit,
    Event,
    Notice,
    Plan,
    SensitivityTable,
    digest,
)

Resumable = TypeVar("Resumable", AnalyzeSettings, CompressSettings)
#: options that cannot change the output, or whose content is compared in their place
FREE = frozenset(
    (
        *("--model", "--revision", "--plan", "--sensitivity", "--data-dir", "--cache-dir"),
        *("--out", "--overwrite", "--resume", "--push-to-hub", "--allow-pickle", "--max-memory"),
        "--eval",
    )
)
_PACKAGES = ("torch", "transformers")
#: counts the changes, within a version, of what the steps of a run hold
STEPS = 3


def resume_or_begin(
    settings: AnalyzeSettings | CompressSettings, recorder: Recorder, *, marker: str = MANIFEST
) -> AbstractContextManager[RunDirectory]:
    """Lock the output, and find the steps that an earlier run finished, if it is to go on.

    `marker`: as `open_run` takes it.
    """
    assert settings.out is not None, "check_settings fills it in"
    return open_run(
        settings.out,
        identify(settings),
        recorder,
        resume=settings.resume,
        overwrite=settings.overwrite,
        marker=marker,
    )


def forget_resume(settings: Resumable, run: RunDirectory) -> Resumable:
    """Return the settings of a run that was never interrupted, which may replace its own output."""
    overwrite = settings.overwrite or run.owns_output
    refuse_existing(run.out, overwrite=overwrite)
    return replace(settings, resume=False, overwrite=overwrite)


def identify(settings: AnalyzeSettings | CompressSettings) -> dict[str, str]:
    """Return the versions and the options of a run as words, by what they are of."""
    found = {"cptq": f"cptq {__version__}, steps {STEPS}"}
    found |= {package: f"{package} {version(package)}" for package in _PACKAGES}
    return found | {
        flag: words for flag, words in spell_options(settings).items() if flag not in FREE
    }


def identify_inputs(
    model: LoadedModel,
    calibration: Calibration | None,
    held_out: Iterable[Batch],
    tables: Mapping[str, SensitivityTable],
) -> dict[str, str]:
    """Return the digests of what a run reads, by what they are of.

    Args:
        model: the dense model.
        calibration: the text; None where nothing reads any.
        held_out: batches of it that do not calibrate.
        tables: those of --sensitivity.
    """
    config = (model.path / "config.json").read_bytes()
    found = {
        "the model": model.fingerprint,
        "the model's config.json": hashlib.sha256(config).hexdigest(),
    }
    if calibration is not None:
        found["the calibration text"] = calibration.record.fingerprint
        found["the text held out from calibration"] = _digest_batches(held_out)
    for metric in sorted(tables):
        found[f"the {metric} table of --sensitivity"] = tables[metric].digest
    return found


def identify_compress(inputs: CompressInputs) -> dict[str, str]:
    """Return the digests of what `compress` reads, by what they are of."""
    text = inputs.held_out
    held_out = [*text.search, *text.guard, *text.tune, *text.judge]
    found = identify_inputs(inputs.model, inputs.calibration, held_out, inputs.tables)
    if inputs.plan is not None:
        found["the plan of --plan"] = digest(inputs.plan.to_dict())
    return found


def share_plan(inputs: CompressInputs, plan: Plan | None, ranks: Ranks) -> Plan:
    """Return the plan of the first process, to carry out with it.

    Raises:
        UsageError: this process has read something else than the first one.
    """
    own = identify(inputs.settings) | identify_compress(inputs) if ranks.count > 1 else {}
    found, first = ranks.share((plan, own))
    for name, what in first.items():
        if own.get(name) != what:
            raise UsageError(
                f"{name} differs: {what} in rank 0, {own.get(name)} in rank {ranks.index}",
                hint="start all processes with the same command and files",
            )
    assert found is not None, "the first process has one"
    return found


def _digest_batches(batches: Iterable[Batch]) -> str:
    rows = (row.cpu() for batch in batches for name in sorted(batch) for row in batch[name])
    return digest_tokens(rows)


def keep_blocks(run: RunDirectory, emit: Emit) -> tuple[Steps, Emit]:
    """Return the steps of a plan that is carried out, and what it is to emit its events to.

    The notices of a block are kept with it, and emitted again when it is taken over.
    """
    notices: list[Notice] = []

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event)
        emit(event)

    def load(step: str) -> list[CompressedLayer] | None:
        if step not in run:
            return None
        layers: list[CompressedLayer]
        layers, kept = run.read(step)
        for notice in kept:
            emit(notice)
        return layers

    def save(step: str, layers: list[CompressedLayer]) -> list[CompressedLayer]:
        found = run.save(step, layers, tuple(notices))
        notices.clear()
        return found

    return Steps(load=load, save=save), note


def estimate_bytes(inputs: CompressInputs) -> int:
    """Return about what the steps take: a byte per code, masks, and scales of 4 bytes at most."""
    masks = any(c.sparsity for row in inputs.space.options.values() for c in row)
    weights = sum(unit.numel for unit in inputs.space.cost.units)
    return weights * (2 if masks else 1) + weights // 8
