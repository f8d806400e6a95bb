"""The leak guard of a run: who watches, and with `--strict` a look ahead before all measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cptq.artifact.manifest import try_read_manifest
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import EvalSettings
from cptq.evaluation import check_task_kind
from cptq.evaluation.harness import show_documents
from cptq.evaluation.leaks import LeakGuard, look_ahead
from cptq.evaluation.options import EvalOptions, Watch, unwatched
from cptq.pipeline.recorder import Recorder
from cptq.types import Emit, Event, Notice


def refuse_leaks(settings: EvalSettings, sources: Sequence[str | None], recorder: Recorder) -> None:
    """With --strict: show each artifact's guard all texts, before any model is measured.

    Costs a second load of each artifact. A directory without a manifest has nothing to look for.

    Raises:
        EvaluationError: a task is measured on text that calibrated.
        The errors of loading and of the tasks' data.
    """
    for source in filter(None, sources if settings.strict else ()):
        folder = Path(source).expanduser()
        if folder.is_dir() and not try_read_manifest(folder).get("calibration"):
            continue
        with recorder.stage("leaks"):
            model = load_model(replace(settings.model, model=source), _unheard)
            for task in settings.tasks:
                check_task_kind(task, model.kind)
            options = replace(eval_options(settings), watch=guard(model, settings, _unheard))
            look_ahead(model, settings.tasks, options)
            if settings.lm_eval:
                show_documents(model, settings.lm_eval, options, _unheard)


def _unheard(event: Event) -> None:
    """What is said is said again when it is measured."""


def guard(model: LoadedModel, settings: EvalSettings, emit: Emit) -> Watch:
    """What watches that the artifact does not meet its calibration text again."""
    calibration = try_read_manifest(model.path).get("calibration")
    if not isinstance(calibration, dict):
        return unwatched
    if not calibration.get("sketch"):
        message = "its manifest has no fingerprints of the calibration text to look for"
        emit(Notice(kind="skipped", subject=model.path.name, message=message))
        return unwatched
    source = str(calibration.get("origin", calibration.get("source", "")))
    return LeakGuard(calibration["sketch"], source, strict=settings.strict, emit=emit)


def eval_options(settings: EvalSettings) -> EvalOptions:
    """What the settings say of every task."""
    return EvalOptions(
        batch_size=settings.batch_size,
        limit=settings.limit,
        seqlen=settings.seqlen,
        stride=settings.stride,
        data_dir=settings.data_dir,
        cache_dir=settings.model.cache_dir,
        token=settings.model.token,
        seed=settings.seed,
        trust_remote_code=settings.model.trust_remote_code,
    )
