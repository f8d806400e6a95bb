"""`cptq compare`: several models or their eval.json files, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cptq.artifact.atomic import check_output, create_directory, write_files
from cptq.config import CompareSettings, EvalSettings, command_line
from cptq.errors import EvaluationError
from cptq.evaluation.baseline import add_paired_differences
from cptq.evaluation.tasks.footprint import count_weight_bytes
from cptq.pipeline.evaluate import (
    PreparedModel,
    measure_model,
    prepare_models,
    report_mismatches,
)
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.summarize import collect_versions
from cptq.report.comparison import (
    ComparedModel,
    CompareOutcome,
    ModelComparison,
    find_shared_quality,
)
from cptq.report.formatting import shorten_names
from cptq.report.render import COMPARISON_FILES, render_comparison_files
from cptq.types import Emit, EvalResult, Notice, join_results

_MEASURE = "`cptq eval MODEL -o eval.json` writes one"


def compare(settings: CompareSettings, emit: Emit) -> CompareOutcome:
    """Measure what is a model, read what is an eval.json, and put all side by side."""
    recorder, place = Recorder(emit), None
    if settings.out is not None:
        place = check_output(
            settings.out,
            overwrite=settings.overwrite,
            source=Path(settings.model.model),
            marker=COMPARISON_FILES["json"],
        )
    models = _collect_models(settings, recorder)
    names = shorten_names(settings.sources)
    named = [replace(model, name=name) for model, name in zip(models, names, strict=True)]
    found = _put_side_by_side(settings, named, recorder)
    if place is None:
        return CompareOutcome(comparison=found)
    files = render_comparison_files(found)
    with create_directory(place, sum(map(len, files.values()))) as draft:
        write_files(draft, files)
    reports = {kind: place / name for kind, name in COMPARISON_FILES.items() if name in files}
    return CompareOutcome(comparison=found, out=settings.out, reports=reports)


def _put_side_by_side(
    settings: CompareSettings, models: Sequence[ComparedModel], recorder: Recorder
) -> ModelComparison:
    quality = find_shared_quality([model.results for model in models])
    if quality is None:
        listed = "; ".join(f"{m.name}: {_list_tasks(m)}" for m in models)
        raise EvaluationError(
            f"no task was measured on all models ({listed})",
            hint="measure them with the same --task",
        )
    with recorder.stage("comparison"):
        others = (_pair(m, models[0], settings, recorder) for m in models[1:])
        paired = [models[0], *others]
    for model in models:
        if model.weight_bytes is None:
            message = "its size is not known, so it is not on the front"
            recorder(Notice(kind="skipped", subject=model.name, message=message))
    return ModelComparison(
        command_line=command_line(settings),
        models=tuple(paired),
        quality=quality,
        versions=collect_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notices=tuple(recorder.notices),
        timings=dict(recorder.timings),
    )


def _list_tasks(model: ComparedModel) -> str:
    return ", ".join(dict.fromkeys(result.task for result in model.results)) or "nothing"


def _pair(
    model: ComparedModel, first: ComparedModel, settings: CompareSettings, recorder: Recorder
) -> ComparedModel:
    joined = join_results(model.results, first.results)
    joined = add_paired_differences(joined, settings.seed)
    report_mismatches(joined, model.name, recorder)
    return replace(model, paired=joined.paired)


def _collect_models(settings: CompareSettings, recorder: Recorder) -> list[ComparedModel]:
    """Read each eval.json, prepare all tasks of the models, then measure one model at a time."""
    sources = settings.sources
    read = {s: _read_results(Path(s).expanduser()) for s in sources if s.endswith(".json")}
    measured = [source for source in sources if source not in read]
    prepared = prepare_models(_build_eval_settings(settings), measured, recorder)
    models = {
        source: _measure(settings, source, tasks, recorder)
        for source, tasks in zip(measured, prepared, strict=True)
    }
    return [{**read, **models}[source] for source in sources]


def _measure(
    settings: CompareSettings, source: str, prepared: PreparedModel, recorder: Recorder
) -> ComparedModel:
    eval_settings = _build_eval_settings(settings)
    model, results = measure_model(eval_settings, prepared, f"evaluate {source}", recorder)
    return ComparedModel(
        name=source,
        source=source,
        kind=model.kind,
        parameters=model.parameters,
        weight_bytes=count_weight_bytes(model.path),
        effective_bits=_read_effective_bits(model.path),
        results=results,
    )


def _build_eval_settings(settings: CompareSettings) -> EvalSettings:
    text = ("limit", "seqlen", "bos", "batch_size", "data_dir")
    shared = ("model", *text, "activations", "seed", "strict")
    costs = () if settings.no_footprint else ("footprint",)
    tasks = tuple(dict.fromkeys((*settings.tasks, *costs)))
    return EvalSettings(tasks=tasks, **{name: getattr(settings, name) for name in shared})


def _read_results(path: Path) -> ComparedModel:
    """Read what `cptq eval -o` wrote about a model.

    Raises:
        EvaluationError: it cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        facts = data["model"]
        results = tuple(map(EvalResult.from_dict, data["evaluation"]))
        if not results:
            raise ValueError("nothing was measured")
        return ComparedModel(
            name=str(path),
            source=str(facts["source"]),
            kind=str(facts["kind"]),
            parameters=int(facts["parameters"]),
            weight_bytes=_find_weight_bytes(facts["source"], results),
            effective_bits=_read_effective_bits(Path(facts["source"])),
            results=results,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EvaluationError(f"{path} holds no results: {reason}", hint=_MEASURE) from error


def _find_weight_bytes(source: str, results: Sequence[EvalResult]) -> int | None:
    """Find the bytes as measured, else as they are on the disk now; None: neither."""
    measured = [int(r.value) for r in results if (r.task, r.metric) == ("size", "weight_bytes")]
    there = Path(source).is_dir()
    return (
        measured[0] if measured else (count_weight_bytes(Path(source)) if there else None) or None
    )


def _read_effective_bits(path: Path) -> float | None:
    """Read the bits of the compressed weights with their scales from an artifact's report."""
    try:
        report: dict[str, Any] = json.loads((path / "report.json").read_text(encoding="utf-8"))
        return float(report["size"]["effective_bits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
