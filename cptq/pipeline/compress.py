"""`cptq compress`: load the inputs, measure, make a plan, compress, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptq.allocation.experts import fix_experts, list_experts
from cptq.allocation.ledger import Ledger
from cptq.artifact.content import build_content
from cptq.artifact.draft import Record, draft
from cptq.artifact.hub import push
from cptq.artifact.reload import ReloadCheck
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.checkpoint.ranks import ALONE, Ranks
from cptq.compression.blockwise import Steps
from cptq.compression.trial_model import TrialModel
from cptq.config import GROUND_TRUTH, CompressSettings, parse_shard_size
from cptq.errors import mark_kept
from cptq.pipeline.activations import add_rules, attach_rules
from cptq.pipeline.carry_out import allocate_plan, carry_out
from cptq.pipeline.disk import check_disk, count_disk
from cptq.pipeline.files import encode_stage_files
from cptq.pipeline.guard import Guard
from cptq.pipeline.inputs import CompressInputs, load_inputs
from cptq.pipeline.nearest_check import check_against_nearest
from cptq.pipeline.plan_check import check_plan
from cptq.pipeline.plan_view import predict_front
from cptq.pipeline.profile import build_masking, spread_zeros
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.refine import refine_plan
from cptq.pipeline.reload_sample import build_sample, build_short_sample
from cptq.pipeline.resume import (
    forget_resume,
    identify_compress,
    keep_blocks,
    resume_or_begin,
    share_plan,
)
from cptq.pipeline.run_directory import RunDirectory, count_steps
from cptq.pipeline.speed import measure_speed
from cptq.pipeline.summarize import describe_check, summarize
from cptq.pipeline.trial_model import build_trial_model
from cptq.pipeline.tune import TuneResult, apply_tuned, record_dense, tune_layers
from cptq.report.derived import build_json
from cptq.report.render import FILES, render_files
from cptq.report.summary import CompressOutcome, Summary
from cptq.sensitivity.measure import measure, needs_text
from cptq.types import (
    ActivationRecord,
    CompressedLayer,
    Emit,
    GuardQuality,
    Keep,
    Notice,
    Plan,
    SensitivityTable,
    SpeedReport,
    keep_nothing,
)

#: the step of what --tune did
TUNED_STEP = "tuned"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedModel:
    """A plan and the layers that carry it out. `tuned` says what --tune did, `activations` what
    --activation-sparsity did; None: nothing."""

    plan: Plan
    layers: tuple[CompressedLayer, ...]
    tuned: Mapping[str, Any] | None = None
    activations: ActivationRecord | None = None


def compress(settings: CompressSettings, emit: Emit, ranks: Ranks = ALONE) -> CompressOutcome:
    """Compress a model into an artifact that is verified and reported on.

    Several `ranks` all call this. The first one does it; the others help it to compress the layers,
    and get the outcome.
    """
    if ranks.index:
        _assist(settings, emit, ranks)
        return ranks.share(None)
    recorder = Recorder(ranks.pass_on(emit))
    with resume_or_begin(settings, recorder) as run:
        ranks.share(run.path)
        inputs = load_inputs(
            forget_resume(settings, run), recorder, folder=run.path, processes=ranks.neighbours
        )
        run.identify(identify_compress(inputs))
        check_disk(count_disk(inputs), kept=run.nbytes)
        guard = Guard(inputs)
        tables = run.keep(
            "sensitivity", lambda: dict(measure_sensitivity(inputs, recorder, run.keep))
        )
        made = run.keep("plan", lambda: make_plan(inputs, tables, recorder))
        plan = run.keep("chosen-plan", lambda: check_plan(inputs, made, guard, recorder, run.keep))
        guard.record_dense(run, recorder)
        compressed = compress_and_tune(inputs, plan, guard, run, recorder, ranks)
        compressed = drop_activations(inputs, compressed, run, recorder)
        with attach_rules(inputs.model, compressed.layers):
            quality = guard.measure(run, recorder, chose_plan=plan.notes != made.notes)
        outcome = write_artifact(inputs, tables, compressed, quality, run, recorder)
    _report_next_step(inputs, emit)
    _push_artifact(inputs, outcome, recorder)
    return ranks.share(outcome)


def _assist(settings: CompressSettings, emit: Emit, ranks: Ranks) -> None:
    """Do this process's share of the layers that the first one compresses."""
    recorder = Recorder(emit)
    path: Path = ranks.share(None)
    settings = replace(settings, push_to_hub=None)
    try:
        inputs = load_inputs(
            settings, recorder, writes=False, folder=path, processes=ranks.neighbours
        )
        _carry_out_together(inputs, None, recorder, ranks)
    except BaseException as error:
        mark_kept(error, count_steps(path), str(path))
        raise


def plan(settings: CompressSettings, emit: Emit) -> Plan:
    """Make the plan that `compress` would carry out, before --check-uniform; write nothing."""
    recorder = Recorder(emit)
    inputs = load_inputs(settings, recorder, writes=False)
    return make_plan(inputs, measure_sensitivity(inputs, recorder), recorder)


def measure_sensitivity(
    inputs: CompressInputs, recorder: Recorder, keep: Keep = keep_nothing
) -> Mapping[str, SensitivityTable]:
    """Return {metric: table}: that of --sensitivity, else measured where the plan needs scores.

    `keep` keeps the units that are finished.
    """
    settings = inputs.settings
    if not inputs.measures:
        return inputs.tables
    with recorder.stage("sensitivity"):
        truth = settings.metric == GROUND_TRUTH
        vocabulary = inputs.space.list_vocabulary_options(inputs.model)
        text = truth or (vocabulary and needs_text([settings.metric]))
        trial = _build_trial_model(inputs, truth, recorder) if text else None
        return measure(
            inputs.model,
            inputs.calibration,
            metrics=[settings.metric],
            candidates=inputs.space.candidates,
            seed=settings.calibration.seed,
            emit=recorder,
            compress=trial.weights if trial and truth else None,
            vocabulary=vocabulary,
            compress_outer=trial.compute_weights if trial else None,
            take_head_moment=trial.take_head_moment if trial else None,
            keep=keep,
        )


def _build_trial_model(inputs: CompressInputs, blocks: bool, emit: Emit) -> TrialModel:
    return build_trial_model(
        inputs.model,
        inputs.calibration,
        inputs.settings.compressor,
        inputs.space.cost,
        inputs.space.candidates,
        seed=inputs.settings.calibration.seed,
        blocks=blocks,
        masking=build_masking(inputs.settings),
        emit=emit,
    )


def make_plan(
    inputs: CompressInputs, tables: Mapping[str, SensitivityTable], recorder: Recorder
) -> Plan:
    """Return the plan of --plan, else allocate one from the scores and refine it by --refine."""
    if inputs.plan is not None:
        return inputs.plan
    table = next(iter(tables.values()), None)
    with recorder.stage("allocation"):
        plan = allocate_plan(inputs, inputs.settings.allocator, table, recorder)
        plan = spread_zeros(inputs, plan, recorder)
    if not inputs.settings.refine:
        return plan
    with recorder.stage("refinement"):
        return refine_plan(
            inputs.model,
            inputs.calibration,
            inputs.held_out,
            plan,
            table,
            _restrict_to_refinable(inputs, plan),
            inputs.settings,
            recorder,
        )


def _restrict_to_refinable(inputs: CompressInputs, plan: Plan) -> Ledger:
    """Return the ledger of what --refine may change: everything but the one scheme of experts."""
    assert inputs.ledger is not None
    experts = list_experts(inputs.model.units)
    return fix_experts(inputs.ledger, plan.choices[experts[0]]) if experts else inputs.ledger


def compress_and_tune(
    inputs: CompressInputs,
    plan: Plan,
    guard: Guard,
    run: RunDirectory,
    recorder: Recorder,
    ranks: Ranks = ALONE,
) -> CompressedModel:
    """Carry out the plan by `compress_layers`, and tune the result where --tune asks for it."""
    if not inputs.settings.tune:
        return compress_layers(inputs, plan, run, recorder, ranks, guard.recorded)
    with recorder.stage("tuning"):
        dense = None if TUNED_STEP in run else record_dense(inputs, guard.judge)
    compressed = compress_layers(inputs, plan, run, recorder, ranks, guard.recorded)

    def tune() -> dict[str, Any]:
        assert dense is not None
        judged = inputs.held_out.errors
        return tune_layers(inputs, compressed.layers, dense, judged, recorder).to_dict()

    with recorder.stage("tuning"):
        found = TuneResult(**run.keep(TUNED_STEP, tune))
        layers = apply_tuned(inputs.model, compressed.layers, found)
    return replace(compressed, layers=tuple(layers), tuned=found.record)


def drop_activations(
    inputs: CompressInputs, compressed: CompressedModel, run: RunDirectory, recorder: Recorder
) -> CompressedModel:
    """Fit the rules of --activation-sparsity to the compressed model."""
    layers, record = add_rules(
        inputs.settings.activation_sparsity,
        inputs.model,
        compressed.layers,
        inputs.space.rules,
        inputs.calibration.batches,
        run,
        recorder,
    )
    return replace(compressed, layers=layers, activations=record)


def compress_layers(
    inputs: CompressInputs,
    plan: Plan,
    run: RunDirectory,
    recorder: Recorder,
    ranks: Ranks = ALONE,
    dense: DivergenceFromDense | None = None,
) -> CompressedModel:
    """Carry out the plan; the model in memory then computes with the compressed weights.

    Every block is a step of the run. `dense`: the divergence on `inputs.held_out.judge`, where it
    was recorded before.
    """
    steps, emit = keep_blocks(run, recorder)
    with recorder.stage("compression"):
        layers = _carry_out_together(inputs, plan, emit, ranks, steps)
    check_against_nearest(inputs, plan, layers, recorder, dense)
    return CompressedModel(plan=plan, layers=tuple(layers))


def _carry_out_together(
    inputs: CompressInputs,
    plan: Plan | None,
    emit: Emit,
    ranks: Ranks,
    steps: Steps | None = None,
) -> list[CompressedLayer]:
    """Carry out the plan, which the first process has, as have `steps`, in all processes."""
    plan = share_plan(inputs, plan, ranks)
    judge = inputs.held_out.errors
    return carry_out(inputs, plan, inputs.calibration, judge, emit, steps, ranks)


def write_artifact(
    inputs: CompressInputs,
    tables: Mapping[str, SensitivityTable],
    compressed: CompressedModel,
    quality: GuardQuality | None,
    run: RunDirectory,
    recorder: Recorder,
) -> CompressOutcome:
    """Write the artifact, verify it by reloading it, and add the report."""
    settings, model, plan = inputs.settings, inputs.model, compressed.plan
    record = Record(
        plan=plan,
        calibration=inputs.calibration.record,
        seed=settings.calibration.seed,
        tuned=compressed.tuned,
    )
    with recorder.stage("artifact"):
        sample = build_sample(inputs)
        most = parse_shard_size(settings.max_shard_size)
        content = build_content(model, compressed.layers, recorder, most, compressed.activations)
        with draft(
            inputs.out,
            overwrite=settings.overwrite,
            source=model.path,
            form=inputs.space.form,
            inside=run.path,
            emit=recorder,
        ) as d:
            files = encode_stage_files(model, record.calibration, tables, plan)
            d.write(content, record, files)
            check = d.verify(sample, short=build_short_sample(inputs, sample, recorder))
            stock = check.weight_bytes if check and d.form.multiplied_out else None
            speed = measure_speed(inputs, d.folder, stock, recorder)
            report = _summarize(inputs, tables, compressed, quality, check, speed, recorder)
            d.add(render_files(report))
            d.describe(build_json(report))
            run.announce_output(d.folder)
    return CompressOutcome(
        summary=report,
        out=inputs.out,
        reports={kind: d.artifact.path / name for kind, name in FILES.items()},
        artifact=d.artifact,
    )


def _summarize(
    inputs: CompressInputs,
    tables: Mapping[str, SensitivityTable],
    compressed: CompressedModel,
    quality: GuardQuality | None,
    check: ReloadCheck | None,
    speed: SpeedReport,
    recorder: Recorder,
) -> Summary:
    """Return everything that is known once the files are written and verified."""
    plan, record = compressed.plan, compressed.activations
    return summarize(
        "compress",
        inputs.settings,
        inputs.model,
        recorder,
        seed=inputs.settings.calibration.seed,
        candidates=inputs.space.candidates,
        calibration=inputs.calibration.record,
        sensitivity=tables,
        budget=plan.budget,
        plan=plan,
        front=predict_front(inputs, next(iter(tables.values()), None), [plan]),
        size=inputs.space.cost.make_size_report(plan.choices),
        results=tuple(layer.result for layer in compressed.layers),
        quality=quality,
        activation_sparsity={} if record is None else record.to_dict(),
        verification=describe_check(check),
        speed=speed,
    )


def _report_next_step(inputs: CompressInputs, emit: Emit) -> None:
    """Emit a notice about what remains to be done for the runtime."""
    runtime = inputs.runtime
    if runtime.next_step is not None:
        message = f"to run it there: {runtime.next_step.format(out=inputs.out)}"
        emit(Notice(kind="info", subject=runtime.name, message=message))


def _push_artifact(inputs: CompressInputs, outcome: CompressOutcome, emit: Emit) -> None:
    """Upload the artifact where --push-to-hub is given."""
    settings = inputs.settings
    if settings.push_to_hub is not None and outcome.artifact is not None:
        path, token = outcome.artifact.path, settings.model.token
        push(path, settings.push_to_hub, token=token, emit=emit)
