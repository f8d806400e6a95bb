"""`cptq analyze`: load the inputs, measure, validate, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import Ledger
from cptq.artifact.atomic import check_output, create_directory, write_files
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.trial_model import TrialModel
from cptq.config import GROUND_TRUTH, RUNTIMES, AnalyzeSettings, find_runtime
from cptq.errors import UsageError
from cptq.pipeline.candidates import build_candidates, offer_vocabulary
from cptq.pipeline.disk import check_analysis
from cptq.pipeline.files import encode_stage_files, read_tables
from cptq.pipeline.inputs import (
    build_cost_model,
    calibrate,
    load_dense,
)
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.resume import forget_resume, identify_inputs, resume_or_begin
from cptq.pipeline.run_directory import RunDirectory
from cptq.pipeline.sparsity import analyze_sparsity
from cptq.pipeline.summarize import summarize
from cptq.pipeline.trial_model import build_trial_model
from cptq.pipeline.validate import build_ledgers, validate
from cptq.report.render import FILES, render_files
from cptq.report.summary import AnalyzeOutcome, Summary
from cptq.sensitivity import SLOW, list_default_metrics
from cptq.sensitivity.measure import measure, needs_text
from cptq.sensitivity.prepare import check_units
from cptq.types import Candidate, Emit, Notice, SensitivityTable, Validation

#: builds the trial model the first time, which takes a pass over the text
BuildTrial = Callable[[], TrialModel | None]
#: every analysis has this file, and a date in it
_MARKER = FILES["json"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnalyzeInputs:
    """What `analyze` works on.

    `known` are the tables of --sensitivity, `missing` the metrics that remain to be measured;
    `calibration` and `cost` are None where nothing needs text. `vocabulary` are the ways to store
    the units outside the blocks. `out` is the output directory as it was typed, `place` its
    absolute path.
    """

    settings: AnalyzeSettings
    model: LoadedModel
    candidates: tuple[Candidate, ...]
    vocabulary: Mapping[str, tuple[Candidate, ...]]
    known: Mapping[str, SensitivityTable]
    missing: tuple[str, ...]
    calibration: Calibration | None
    cost: CostModel | None
    ledgers: Sequence[Ledger]
    out: Path
    place: Path


def analyze(settings: AnalyzeSettings, emit: Emit) -> AnalyzeOutcome:
    """Measure how sensitive each unit is to compression, and report it."""
    recorder = Recorder(emit)
    with resume_or_begin(settings, recorder, marker=_MARKER) as run:
        inputs = _load_inputs(forget_resume(settings, run), recorder, run.path)
        run.identify(_identify_inputs(inputs))
        check_analysis(inputs)
        trial = cache(lambda: _build_trial_model(inputs, recorder))
        measured = run.keep("sensitivity", lambda: _measure_missing(inputs, trial, run, recorder))
        tables = {**inputs.known, **measured}
        validation = _validate_tables(inputs, tables, trial, run, recorder)
        sparsity = run.keep("sparsity", lambda: _analyze_sparsity(inputs, recorder))
        summary = _write_analysis(inputs, tables, validation, run, recorder, sparsity)
    return AnalyzeOutcome(
        summary=summary,
        out=inputs.out,
        reports={kind: inputs.out / name for kind, name in FILES.items()},
    )


def _load_inputs(settings: AnalyzeSettings, recorder: Recorder, folder: Path) -> AnalyzeInputs:
    """Load the model, the tables and the text, and check them before anything is measured.

    `folder`: where activations go that memory does not hold.
    """
    model = load_dense(settings, recorder, conv1d=True, folder=folder)
    check_units(model)
    _report_dense_layers(model, settings, recorder)
    out = settings.out or Path(f"{model.path.name}-analysis")
    place = check_output(out, overwrite=settings.overwrite, source=model.path, marker=_MARKER)
    candidates = build_candidates(settings, model)
    vocabulary = offer_vocabulary(model, candidates)
    wanted = {unit.name: candidates for unit in model.units} | vocabulary
    known = read_tables(settings.sensitivity, model.fingerprint, wanted)
    missing = tuple(name for name in settings.metrics if name not in known)
    judges = settings.validate or settings.sparsity_analysis
    text = judges or (bool(missing) and needs_text(missing))
    cost = build_cost_model(model, settings, candidates, vocabulary) if text else None
    ledgers: list[Ledger] = []
    if settings.validate and cost is not None:
        # before the work, so that an unreachable target is refused at once
        ledgers = build_ledgers(cost, candidates, vocabulary, settings)
    parts = int(judges)
    calibration = calibrate(model, settings, recorder, parts=parts) if text else None
    _report_slow_metrics(settings.metrics, recorder)
    return AnalyzeInputs(
        settings=settings,
        model=model,
        candidates=candidates,
        vocabulary=vocabulary,
        ledgers=ledgers,
        known=known,
        missing=missing,
        calibration=calibration,
        cost=cost,
        out=out,
        place=place,
    )


def _identify_inputs(inputs: AnalyzeInputs) -> dict[str, str]:
    """Return the digests of what this run reads, by what they are of."""
    calibration = inputs.calibration
    held_out = calibration.held_out if calibration else []
    return identify_inputs(inputs.model, calibration, held_out, inputs.known)


def _build_trial_model(inputs: AnalyzeInputs, recorder: Recorder) -> TrialModel | None:
    """Build the trial model where anything reads text, else return None.

    Its blocks can be tried only where --validate or --metric kl need them.
    """
    settings, calibration = inputs.settings, inputs.calibration
    if calibration is None or inputs.cost is None:
        return None
    with recorder.stage("calibration"):
        return build_trial_model(
            inputs.model,
            calibration,
            settings.compressor,
            inputs.cost,
            inputs.candidates,
            seed=settings.calibration.seed,
            blocks=settings.validate or GROUND_TRUTH in inputs.missing,
            emit=recorder,
        )


def _measure_missing(
    inputs: AnalyzeInputs, build: BuildTrial, run: RunDirectory, recorder: Recorder
) -> dict[str, SensitivityTable]:
    """Measure the metrics that no earlier analysis measured."""
    if not inputs.missing:
        return {}
    trial = build()
    with recorder.stage("sensitivity"):
        return measure(
            inputs.model,
            inputs.calibration,
            metrics=inputs.missing,
            candidates=inputs.candidates,
            seed=inputs.settings.calibration.seed,
            emit=recorder,
            compress=trial.weights if trial else None,
            vocabulary=inputs.vocabulary,
            compress_outer=trial.compute_weights if trial else None,
            take_head_moment=trial.take_head_moment if trial else None,
            keep=run.keep,
        )


def _validate_tables(
    inputs: AnalyzeInputs,
    tables: Mapping[str, SensitivityTable],
    build: BuildTrial,
    run: RunDirectory,
    recorder: Recorder,
) -> Validation | None:
    """Compare the scores with measured divergences where --validate is given."""
    if not inputs.settings.validate:
        return None
    trial = build()
    assert inputs.calibration is not None
    assert inputs.cost is not None
    assert trial is not None
    with recorder.stage("validation"):
        return validate(
            inputs.model,
            inputs.calibration,
            tables,
            inputs.candidates,
            inputs.cost,
            inputs.ledgers,
            trial,
            inputs.settings,
            recorder,
            run.keep,
        )


def _analyze_sparsity(inputs: AnalyzeInputs, recorder: Recorder) -> Mapping[str, Any]:
    """Measure what --sparsity-analysis asks for; empty without it."""
    if not inputs.settings.sparsity_analysis or inputs.calibration is None:
        return {}
    with recorder.stage("sparsity"):
        seed = inputs.settings.calibration.seed
        return analyze_sparsity(inputs.model, inputs.calibration, seed, recorder)


def _write_analysis(
    inputs: AnalyzeInputs,
    tables: Mapping[str, SensitivityTable],
    validation: Validation | None,
    run: RunDirectory,
    recorder: Recorder,
    sparsity: Mapping[str, Any],
) -> Summary:
    """Write all files of an analysis, whole or not at all, and return its summary."""
    record = inputs.calibration.record if inputs.calibration else None
    report = summarize(
        "analyze",
        inputs.settings,
        inputs.model,
        recorder,
        seed=inputs.settings.calibration.seed,
        candidates=inputs.candidates,
        calibration=record,
        sensitivity=tables,
        validation=validation,
        sparsity=sparsity,
    )
    files = encode_stage_files(inputs.model, record, tables, None, validation, sparsity=sparsity)
    files |= render_files(report)
    need = sum(map(len, files.values()))
    with create_directory(inputs.place, need, inside=run.path) as folder:
        write_files(folder, files)
        run.announce_output(folder)
    return report


def _report_dense_layers(model: LoadedModel, settings: AnalyzeSettings, emit: Emit) -> None:
    """Emit a notice about Conv1D layers, which are measured always and compressed by few runtimes.

    Raises:
        UsageError: plans are to be compared, and the runtime compresses none of the layers.
    """
    runtime = find_runtime(settings.runtime)
    taken = [u.name for u in model.units if not any(layer.transposed for layer in u.layers)]
    if runtime.conv1d or len(taken) == len(model.units):
        return
    wider = " or ".join(name for name, known in RUNTIMES.items() if known.conv1d)
    if settings.validate and not taken:
        raise UsageError(
            f"--runtime {runtime.name} keeps every layer of this model dense (they are Conv1D), so "
            "there are no plans to compare",
            hint=f"add --runtime {wider}",
        )
    count = len(model.units) - len(taken)
    message = f"{count} Conv1D layers are measured, and stay dense except with --runtime {wider}"
    emit(Notice(kind="info", subject=f"--runtime {runtime.name}", message=message))


def _report_slow_metrics(metrics: tuple[str, ...], emit: Emit) -> None:
    """Emit a notice about the slow metrics, which `--metric all` leaves out."""
    left_out = [name for name in SLOW if name not in metrics]
    if left_out and set(list_default_metrics()) <= set(metrics):
        names = " ".join(f"--metric {name}" for name in left_out)
        message = (
            f"without {', '.join(left_out)}, which runs half the model on the held-out text for "
            f"every unit and width; add it with {names}"
        )
        emit(Notice(kind="info", subject="--metric all", message=message))
