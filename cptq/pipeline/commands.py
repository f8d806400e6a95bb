"""The three commands, a stage a line. No branch on a method's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cptq.allocation.allocate import allocate, check_plan
from cptq.allocation.cost import CostModel
from cptq.allocation.targets import resolve_budget
from cptq.artifact.writer import VerificationSample, write_artifact
from cptq.calibration.replay import forward
from cptq.calibration.tokens import Batch, Calibration, build_calibration
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.compression.blockwise import compress_model
from cptq.config import AnalyzeSettings, CompressSettings, EvalSettings, ModelSettings
from cptq.errors import ModelError, PlanError
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.run import evaluate as run_task
from cptq.pipeline.facts import summary
from cptq.pipeline.files import atomic_directory, atomic_file, stage_files, write_stage_files
from cptq.pipeline.recorder import Recorder
from cptq.report.render import render_json, write_reports
from cptq.report.summary import (
    AnalyzeOutcome,
    CompressOutcome,
    EvalOutcome,
    VerificationFacts,
)
from cptq.sensitivity.measure import measure
from cptq.types import Candidate, Emit, EvalResult, Plan, SensitivityTable

#: tokens of the input on which a written artifact is compared with the model in memory
SAMPLE_TOKENS = 64


def analyze(settings: AnalyzeSettings, emit: Emit) -> AnalyzeOutcome:
    """Measure how much each unit may be squeezed, and report it."""
    recorder = Recorder(emit)
    model = _load_dense(settings.model, recorder)
    with recorder.stage("calibration"):
        calibration = build_calibration(model, settings.calibration, settings.model, recorder)
    choices = candidates(settings.bits, settings.group_size)
    with recorder.stage("sensitivity"):
        tables = measure(
            model,
            calibration,
            metrics=settings.metrics,
            candidates=choices,
            seed=settings.calibration.seed,
            emit=recorder,
        )
    report = summary(
        "analyze",
        settings,
        model,
        recorder,
        seed=settings.calibration.seed,
        candidates=choices,
        calibration=calibration.record,
        sensitivity=tables,
    )
    out = settings.out or Path(f"{model.path.name}-analysis")
    with atomic_directory(out, overwrite=settings.overwrite) as place:
        write_stage_files(place, stage_files(model, calibration.record, tables, None))
        names = write_reports(report, place)
    reports = {kind: out / path.name for kind, path in names.items()}
    return AnalyzeOutcome(summary=report, out=out, reports=reports)


def compress(settings: CompressSettings, emit: Emit) -> CompressOutcome:
    """Plan, compress, write and verify an artifact."""
    recorder = Recorder(emit)
    model = _load_dense(settings.model, recorder)
    cost = CostModel(model.units, model.tensors)
    choices = candidates(settings.bits, settings.group_size)
    plan = _given_plan(settings, model, cost)
    if plan is None:  # a target out of reach is refused before anything is measured
        resolve_budget(_target(settings), cost, settings.group_size, choices)
    with recorder.stage("calibration"):
        calibration = build_calibration(model, settings.calibration, settings.model, recorder)
    tables: dict[str, SensitivityTable] = {}
    if plan is None:
        plan, tables = _make_plan(settings, model, cost, calibration, recorder)
    with recorder.stage("compression"):
        layers = compress_model(
            model, calibration, plan, compressor=settings.compressor, emit=recorder
        )
    out = settings.out or Path(f"{model.path.name}-cptq-{plan.budget.asked}")
    with recorder.stage("artifact"):
        artifact = write_artifact(
            model,
            layers,
            plan,
            calibration=calibration.record,
            out=out,
            overwrite=settings.overwrite,
            seed=settings.calibration.seed,
            sample=_verification_sample(model, calibration),
            extras=stage_files(model, calibration.record, tables, plan),
            emit=recorder,
        )
    report = summary(
        "compress",
        settings,
        model,
        recorder,
        seed=settings.calibration.seed,
        candidates=choices,
        calibration=calibration.record,
        sensitivity=tables,
        budget=plan.budget,
        plan=plan,
        size=cost.size_report(plan.choices),
        results=tuple(layer.result for layer in layers),
        verification=_verification_facts(artifact.manifest),
    )
    reports = write_reports(report, artifact.path)
    return CompressOutcome(summary=report, out=out, reports=reports, artifact=artifact)


def evaluate(settings: EvalSettings, emit: Emit) -> EvalOutcome:
    """Run tasks on a model or artifact, and on a baseline beside it."""
    recorder = Recorder(emit)
    baseline: tuple[EvalResult, ...] = ()
    if settings.baseline is not None:
        _, baseline = _run_tasks(settings, settings.baseline, "baseline", recorder)
    model, results = _run_tasks(settings, settings.model.model, "evaluation", recorder)
    report = summary(
        "eval",
        settings,
        model,
        recorder,
        seed=settings.seed,
        evaluation=results,
        baseline=baseline,
        baseline_source=settings.baseline,
    )
    if settings.out is not None:
        atomic_file(settings.out, render_json(report), overwrite=settings.overwrite)
    return EvalOutcome(summary=report, out=settings.out)


def candidates(bits: tuple[int, ...], group_size: int) -> tuple[Candidate, ...]:
    """One candidate per width, fewest bits first; 16 keeps a unit dense."""
    return tuple(
        Candidate(bits=width, group_size=0 if width == 16 else group_size)
        for width in sorted(set(bits))
    )


def _load_dense(settings: ModelSettings, recorder: Recorder) -> LoadedModel:
    with recorder.stage("load"):
        model = load_model(settings, recorder)
    if model.quantized:
        raise ModelError(
            f"{model.source} is compressed already",
            allowed="a dense checkpoint",
            hint="compress the model that it was made from; cptq eval takes artifacts",
        )
    return model


def _target(settings: CompressSettings) -> str:
    return settings.target or "4bit"


def _given_plan(settings: CompressSettings, model: LoadedModel, cost: CostModel) -> Plan | None:
    """The plan of `--plan`, checked against this model, its bytes counted anew."""
    if settings.plan is None:
        return None
    try:
        plan = Plan.from_dict(json.loads(settings.plan.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{settings.plan} holds no plan: {error}") from error
    check_plan(plan, cost, model.fingerprint)
    return replace(plan, predicted_bytes=cost.file_bytes(plan.choices))


def _make_plan(
    settings: CompressSettings,
    model: LoadedModel,
    cost: CostModel,
    calibration: Calibration,
    recorder: Recorder,
) -> tuple[Plan, dict[str, SensitivityTable]]:
    choices = candidates(settings.bits, settings.group_size)
    with recorder.stage("sensitivity"):
        tables = measure(
            model,
            calibration,
            metrics=[settings.metric],
            candidates=choices,
            seed=settings.calibration.seed,
            emit=recorder,
        )
    with recorder.stage("allocation"):
        plan = allocate(
            settings.allocator,
            tables[settings.metric],
            cost,
            resolve_budget(_target(settings), cost, settings.group_size, choices),
            choices,
            model_fingerprint=model.fingerprint,
            emit=recorder,
        )
    return plan, tables


@torch.no_grad()
def _verification_sample(model: LoadedModel, calibration: Calibration) -> VerificationSample:
    """A short input and what the compressed model in memory makes of it."""
    batch: Batch = {name: x[:1, :SAMPLE_TOKENS] for name, x in calibration.batches[0].items()}
    return VerificationSample(inputs=batch, expected=_answer(forward(model, batch)))


def _answer(output: Any) -> torch.Tensor:
    answer = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(answer, torch.Tensor)
    return answer.float().cpu()


def _verification_facts(manifest: Any) -> VerificationFacts | None:
    found = manifest.get("verification")
    if not found:
        return None
    return VerificationFacts(
        missing=tuple(found["missing"]),
        unexpected=tuple(found["unexpected"]),
        mismatched=tuple(found["mismatched"]),
        max_abs_difference=found["max_abs_difference"],
        seconds=found["seconds"],
    )


def _run_tasks(
    settings: EvalSettings, source: str, stage: str, recorder: Recorder
) -> tuple[LoadedModel, tuple[EvalResult, ...]]:
    with recorder.stage("load"):
        model = load_model(replace(settings.model, model=source), recorder)
    options = EvalOptions(
        batch_size=settings.batch_size,
        limit=settings.limit,
        seqlen=settings.seqlen,
        data_dir=settings.data_dir,
        cache_dir=settings.model.cache_dir,
        token=settings.model.token,
        seed=settings.seed,
        trust_remote_code=settings.model.trust_remote_code,
    )
    results: list[EvalResult] = []
    with recorder.stage(stage):
        for task in settings.tasks:
            results += run_task(model, task, options, recorder)
    return model, tuple(results)
