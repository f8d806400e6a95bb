"""`cptq eval`: run tasks on a model or artifact, and on a baseline beside it.

All tasks of all models are prepared and checked for leaks first; then each model is loaded and
measured, the baseline first, so that two models are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cptq.artifact.atomic import (
    check_output,
    create_directory,
    refuse_existing,
    write_file,
    write_files,
)
from cptq.artifact.manifest import try_read_manifest
from cptq.checkpoint.loader import load_model, read_spec
from cptq.checkpoint.memory import GPU_SHARE_TO_RUN, choose_memory
from cptq.checkpoint.model import LoadedModel
from cptq.config import RESULT_FILE, EvalSettings, ModelSettings, parse_max_memory
from cptq.data.overlap import decode_sketch
from cptq.evaluation.baseline import add_flips, add_paired_differences
from cptq.evaluation.divergence import StateComparer, StateRecorder
from cptq.evaluation.in_domain import mark_in_domain
from cptq.evaluation.leak_check import CalibrationText, check_leaks
from cptq.evaluation.task import EvalOptions, Observer, PreparedTask, prepare_task
from cptq.evaluation.tasks.harness import prepare_harness, resolve_tasks
from cptq.inference.modules import find_packed_modules
from cptq.inference.operations import exact_products
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.summarize import summarize
from cptq.report.render import FILES, render_files, render_json
from cptq.report.summary import EvalOutcome, Summary
from cptq.types import Comparison, Emit, EvalResult, Notice, Progress, join_results

Results = tuple[EvalResult, ...]
#: `--activations` that are not rounded
EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model that is not loaded yet, and the tasks that are prepared for it.

    `calibrated_on` is the source of the text that calibrated an artifact (None: not known).
    """

    settings: ModelSettings
    tasks: tuple[PreparedTask, ...]
    calibrated_on: str | None = None


def evaluate(settings: EvalSettings, emit: Emit) -> EvalOutcome:
    """Run tasks on a model or artifact, and on a baseline beside it."""
    recorder = Recorder(emit)
    place = _check_place(settings)
    sources = [source for source in (settings.baseline, settings.model.model) if source]
    *baselines, prepared = prepare_models(settings, sources, recorder)
    if baselines:
        model, results, baseline = _measure_both(settings, baselines[0], prepared, recorder)
    else:
        model, results = measure_model(settings, prepared, "evaluation", recorder)
        baseline = ()
    with recorder.stage("comparison"):
        joined = add_flips(join_results(results, baseline))
        joined = add_paired_differences(joined, settings.seed)
    report_mismatches(joined, "baseline", recorder)
    report = summarize(
        "eval",
        settings,
        model,
        recorder,
        seed=settings.seed,
        comparison=joined,
        baseline_source=settings.baseline,
        activations=settings.activations if find_packed_modules(model.module) else "",
    )
    reports = {} if place is None else _write(report, place, settings)
    return EvalOutcome(summary=report, out=settings.out, reports=reports)


def _check_place(settings: EvalSettings) -> Path | None:
    """Return where to write, which may be written; None: nothing is written.

    Raises:
        OutputExistsError: it exists and may not be replaced.
        ArtifactError: it is a directory that `eval` did not write.
    """
    out = settings.out
    if out is None:
        return None
    if out.suffix == RESULT_FILE:
        refuse_existing(out, overwrite=settings.overwrite)
        return out
    source = Path(settings.model.model).expanduser()
    return check_output(out, overwrite=settings.overwrite, source=source, marker=FILES["json"])


def _write(report: Summary, place: Path, settings: EvalSettings) -> dict[str, Path]:
    """Write one JSON file, or a directory of three reports; return {kind: file}."""
    if place.suffix == RESULT_FILE:
        write_file(place, render_json(report), overwrite=settings.overwrite)
        return {"json": place}
    files = render_files(report)
    with create_directory(place, sum(map(len, files.values()))) as draft:
        write_files(draft, files)
    assert settings.out is not None
    return {kind: settings.out / name for kind, name in FILES.items()}


def prepare_models(
    settings: EvalSettings, sources: Sequence[str], recorder: Recorder
) -> list[PreparedModel]:
    """Prepare all tasks for each model, without loading one, and check them for leaks.

    Raises:
        ModelError: a model is not found, or is not a text model.
        EvaluationError: a model cannot do a task; with --strict, a task is measured on text that
            calibrated the model.
        DataError: the data of a task is missing or malformed.
        UnknownNameError: no such task.
    """
    if settings.lm_eval:
        resolve_tasks(settings.lm_eval)
    with recorder.stage("prepare"):
        return [_prepare_model(settings, source, recorder) for source in sources]


def _prepare_model(settings: EvalSettings, source: str, recorder: Recorder) -> PreparedModel:
    model_settings, options = replace(settings.model, model=source), _build_options(settings)
    spec = read_spec(model_settings, recorder)
    tasks: list[PreparedTask] = []
    total = len(settings.tasks) + bool(settings.lm_eval)
    for done, name in enumerate(settings.tasks):
        recorder(Progress(stage="prepare", done=done, total=total, message=name))
        tasks.append(prepare_task(spec, name, options, recorder))
    if settings.lm_eval:
        recorder(Progress(stage="prepare", done=total - 1, total=total, message="lm-eval"))
        tasks.append(prepare_harness(spec, settings.lm_eval, options, recorder))
    recorder(Progress(stage="prepare", done=total, total=total))
    record = _read_calibration(spec.path)
    calibration = _read_sketch(record, spec.path.name, recorder)
    if calibration is not None:
        for task in tasks:
            check_leaks(task, calibration, strict=settings.strict, emit=recorder)
    return PreparedModel(
        settings=model_settings,
        tasks=tuple(tasks),
        calibrated_on=str(record["source"]) if "source" in record else None,
    )


def _build_options(settings: EvalSettings) -> EvalOptions:
    return EvalOptions(
        batch_size=settings.batch_size,
        limit=settings.limit,
        seqlen=settings.seqlen,
        bos=settings.bos,
        stride=settings.stride,
        data_dir=settings.data_dir,
        cache_dir=settings.model.cache_dir,
        token=settings.model.token,
        seed=settings.seed,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _read_calibration(path: Path) -> Mapping[str, Any]:
    """Read the record of the text that calibrated an artifact; empty of other models."""
    calibration = try_read_manifest(path).get("calibration")
    return calibration if isinstance(calibration, dict) else {}


def _read_sketch(record: Mapping[str, Any], name: str, emit: Emit) -> CalibrationText | None:
    """Read the sketch of the calibration text; None if it was not recorded."""
    if not record:
        return None
    if not record.get("sketch"):
        message = "its manifest has no fingerprints of the calibration text to look for"
        emit(Notice(kind="skipped", subject=name, message=message))
        return None
    origin = str(record.get("origin", record.get("source", "")))
    return CalibrationText(name=origin, sketch=decode_sketch(record["sketch"]))


def measure_model(
    settings: EvalSettings,
    prepared: PreparedModel,
    stage: str,
    recorder: Recorder,
    observer: Observer | None = None,
) -> tuple[LoadedModel, Results]:
    """Load the model and measure it by each of its tasks."""
    with recorder.stage("load"):
        memory = choose_memory(parse_max_memory(settings.max_memory))
        memory = replace(memory, of_gpu=GPU_SHARE_TO_RUN)
        model = load_model(prepared.settings, recorder, memory=memory)
    options = replace(_build_options(settings), observer=observer)
    results: list[EvalResult] = []
    with recorder.stage(stage), _choose_activations(settings, model, recorder):
        for task in prepared.tasks:
            results += task.measure(model, options, recorder)
    return model, tuple(mark_in_domain(results, prepared.calibrated_on))


def _choose_activations(
    settings: EvalSettings, model: LoadedModel, emit: Emit
) -> AbstractContextManager[None]:
    """Return the context in which packed weights are multiplied as the settings say."""
    if settings.activations == EXACT:
        return exact_products()
    packed = bool(find_packed_modules(model.module))
    message = (
        "activations were rounded to 8 bits where packed weights were multiplied"
        if packed
        else "no weight stays packed in memory, so --activations 8bit changes nothing"
    )
    emit(Notice(kind="info" if packed else "skipped", subject=model.source, message=message))
    return exact_products(False)


def _measure_both(
    settings: EvalSettings, baseline: PreparedModel, model: PreparedModel, recorder: Recorder
) -> tuple[LoadedModel, Results, Results]:
    """Measure the baseline, and once it is no longer in memory the model."""
    with TemporaryDirectory(prefix="cptq-baseline-") as folder:
        states = StateRecorder(folder=Path(folder))
        theirs = measure_model(settings, baseline, "baseline", recorder, states)[1]
        comparer = StateComparer(recorded=states.recorded)
        loaded, mine = measure_model(settings, model, "evaluation", recorder, comparer)
        theirs += tuple(mark_in_domain(states.finish(), baseline.calibrated_on))
    return loaded, mine, theirs


def report_mismatches(joined: Comparison, subject: str, emit: Emit) -> None:
    """Emit a Notice for every result that cannot be paired with the baseline's."""
    for row in joined.rows:
        if row.mismatch is not None:
            what = f"{row.result.task} {row.result.metric}: {row.mismatch}"
            emit(Notice(kind="skipped", subject=subject, message=f"no paired comparison of {what}"))
