"""`cptq eval`: run tasks on a model or artifact, and on a baseline beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cptq.artifact.atomic import atomic_file, refuse_existing
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import EvalSettings
from cptq.evaluation import check_task_kind
from cptq.evaluation.divergence import Comparer, Keeper
from cptq.evaluation.flips import with_flips
from cptq.evaluation.harness import resolve_tasks, run_harness, show_documents
from cptq.evaluation.options import Beside
from cptq.evaluation.paired import compare_results
from cptq.evaluation.run import evaluate as run_task
from cptq.pipeline.guard import eval_options, guard, refuse_leaks
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.summarize import summary
from cptq.report.render import render_json
from cptq.report.summary import EvalOutcome
from cptq.types import Emit, EvalResult, Notice, PairedDifference


def evaluate(settings: EvalSettings, emit: Emit) -> EvalOutcome:
    """Run tasks on a model or artifact, and on a baseline beside it."""
    recorder = Recorder(emit)
    if settings.out is not None:
        refuse_existing(settings.out, overwrite=settings.overwrite)
    if settings.lm_eval:
        resolve_tasks(settings.lm_eval)
    refuse_leaks(settings, (settings.model.model, settings.baseline), recorder)
    model, results, baseline = _both(settings, recorder)
    report = summary(
        "eval",
        settings,
        model,
        recorder,
        seed=settings.seed,
        evaluation=results,
        baseline=baseline,
        baseline_source=settings.baseline,
        paired=_paired(results, baseline, settings.seed, recorder),
    )
    if settings.out is not None:
        atomic_file(settings.out, render_json(report), overwrite=settings.overwrite)
    return EvalOutcome(summary=report, out=settings.out)


def _both(
    settings: EvalSettings, recorder: Recorder
) -> tuple[LoadedModel, tuple[EvalResult, ...], tuple[EvalResult, ...]]:
    """The model, its results, the baseline's: measured first, and gone when the model is loaded."""
    source = settings.model.model
    if settings.baseline is None:
        return *run_tasks(settings, source, "evaluation", recorder, None), ()
    with TemporaryDirectory(prefix="cptq-baseline-") as folder:
        keeper = Keeper(folder=Path(folder))
        baseline = run_tasks(settings, settings.baseline, "baseline", recorder, keeper)[1]
        comparer = Comparer(kept=keeper.kept)
        model, results = run_tasks(settings, source, "evaluation", recorder, comparer)
    return model, with_flips(results, baseline), baseline


def run_tasks(
    settings: EvalSettings,
    source: str,
    stage: str,
    recorder: Recorder,
    beside: Beside | None = None,
) -> tuple[LoadedModel, tuple[EvalResult, ...]]:
    """Load `source` and measure it by each task; a task that it cannot do stops all at once."""
    with recorder.stage("load"):
        model = load_model(replace(settings.model, model=source), recorder)
    for task in settings.tasks:
        check_task_kind(task, model.kind)
    watch = guard(model, settings, recorder)
    options = replace(eval_options(settings), watch=watch, beside=beside)
    if settings.lm_eval:
        show_documents(model, settings.lm_eval, options, recorder)
    results: list[EvalResult] = []
    with recorder.stage(stage):
        for task in settings.tasks:
            results += run_task(model, task, options, recorder)
        if settings.lm_eval:
            results += run_harness(model, settings.lm_eval, options, recorder)
    return model, tuple(results)


def _paired(
    results: tuple[EvalResult, ...],
    baseline: tuple[EvalResult, ...],
    seed: int,
    recorder: Recorder,
) -> tuple[PairedDifference, ...]:
    """How sure each difference is; what cannot be paired is said."""
    with recorder.stage("comparison"):
        found, reasons = compare_results(results, baseline, seed)
    for reason in reasons:
        message = f"no paired comparison of {reason}"
        recorder(Notice(kind="skipped", subject="baseline", message=message))
    return tuple(found)
