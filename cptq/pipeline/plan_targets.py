"""`cptq plan`: plans of several sizes from one measurement, explained, edited and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from cptq.allocation import BLIND
from cptq.allocation.allocate import check_plan
from cptq.allocation.explain import explain_unit, find_choice
from cptq.allocation.ledger import Ledger
from cptq.allocation.problem import AllocationProblem, build_problem
from cptq.allocation.targets import resolve_target
from cptq.artifact.atomic import check_output, create_directory, write_files
from cptq.config import CompressSettings, PlanSettings, command_line, describe, parse_edit
from cptq.errors import PlanError, UsageError
from cptq.pipeline.compress import measure_sensitivity
from cptq.pipeline.estimate import run_probe, time_plan
from cptq.pipeline.files import encode_stage_files
from cptq.pipeline.inputs import CompressInputs, load_inputs
from cptq.pipeline.plan_view import allocate_within, view_plans
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.summarize import describe_model
from cptq.registry import find_closest
from cptq.report.plans import PlansOutcome
from cptq.report.render import render_plan_files
from cptq.types import (
    Budget,
    Candidate,
    Emit,
    Explanation,
    Notice,
    Plan,
    Progress,
    SensitivityTable,
    Unit,
)

#: marks a directory of plans
MARKER = "plans.json"


def plan_targets(settings: PlanSettings, emit: Emit) -> PlansOutcome:
    """Make a plan for every target; measure at most once, and compress nothing.

    Raises:
        CptqError: the model, the text or the scores cannot be used; no plan reaches a target; an
            edit or an explanation names no unit, or what it cannot have.
    """
    recorder = Recorder(emit)
    inputs = load_inputs(_as_compress(settings), recorder, writes=False)
    place = None
    if settings.out is not None:
        source = inputs.model.path
        place = check_output(
            settings.out, overwrite=settings.overwrite, source=source, marker=MARKER
        )
    ledgers = [_build_ledger(inputs, target) for target in settings.targets]
    edits = [_find_edit(inputs.space.cost.units, words) for words in settings.edits]
    named = [find_unit(inputs.space.cost.units, word) for word in settings.explain]
    if named and settings.allocator in BLIND:
        raise UsageError(
            f"--explain needs scores, and --allocator {settings.allocator} reads none",
            hint="leave out one of them",
        )
    tables = measure_sensitivity(inputs, recorder)
    table = next(iter(tables.values()), None)
    with recorder.stage("allocation"):
        made = [
            allocate_within(inputs, settings.allocator, table, ledger, recorder)
            for ledger in ledgers
        ]
        plans = [
            edit_plan(plan, edits, ledger, table, recorder)
            for plan, ledger in zip(made, ledgers, strict=True)
        ]
        explained = _explain(inputs, named, plans, ledgers, table)
    with recorder.stage("estimate"):
        recorder(Progress(stage="estimate", done=0, total=None, message="time a block"))
        probe = run_probe(inputs)
        view = view_plans(inputs, plans, tables, lambda p: time_plan(inputs, probe, p), recorder)
    outcome = PlansOutcome(
        model=describe_model(inputs.model),
        command_line=command_line(settings),
        settings=describe(settings),
        view=view,
        table=table,
        explanations=tuple(explained),
        notices=tuple(recorder.notices),
        timings=recorder.timings,
    )
    return outcome if place is None else _write(outcome, inputs, tables, settings, place)


def _as_compress(settings: PlanSettings) -> CompressSettings:
    """Return the settings of the run that would compress to the first target."""
    own = {item.name for item in fields(PlanSettings)}
    shared = [item.name for item in fields(CompressSettings) if item.name in own]
    given = {name: getattr(settings, name) for name in shared if name not in ("out", "overwrite")}
    return CompressSettings(**given, target=settings.targets[0], dry_run=True)


def _build_ledger(inputs: CompressInputs, target: str) -> Ledger:
    space = inputs.space
    return resolve_target(target, space.cost, inputs.settings.group_size, space.options)


def find_unit(units: Sequence[Unit], word: str) -> Unit:
    """Return the unit of a name, of the name of one of its layers, or of a part that is unique.

    Raises:
        PlanError: there is none, or more than one.
    """
    exact = [u for u in units if word in _list_names(u)]
    found = exact or [u for u in units if any(word in name for name in _list_names(u))]
    if len(found) == 1:
        return found[0]
    names = [unit.name for unit in units]
    if found:
        some = ", ".join(unit.name for unit in found[:3])
        raise PlanError(
            f"{word!r} is part of the names of {len(found)} units", allowed=f"one of {some}, ..."
        )
    near = find_closest(word, names)
    raise PlanError(
        f"the model has no unit {word!r}",
        allowed=f"{len(names)} names such as {', '.join(names[:3])}",
        hint=f"did you mean {near!r}?" if near else None,
    )


def _list_names(unit: Unit) -> list[str]:
    return [unit.name, *(layer.name for layer in unit.layers)]


def _find_edit(units: Sequence[Unit], words: str) -> tuple[Unit, str]:
    name, choice = parse_edit(words)
    return find_unit(units, name), choice


def edit_plan(
    plan: Plan,
    edits: Sequence[tuple[Unit, str]],
    ledger: Ledger,
    table: SensitivityTable | None,
    emit: Emit,
) -> Plan:
    """Return a plan with other choices for some units, its bytes and loss counted anew.

    A plan that no longer keeps its budget gets one of its own bytes, and a notice says so.

    Raises:
        PlanError: a unit cannot have what an edit names.
    """
    if not edits:
        return plan
    choices, notes = dict(plan.choices), list(plan.notes)
    for unit, words in edits:
        choice = _choose(unit, words, ledger, table)
        notes.append(f"{unit.name} set to {choice.label}, was {choices[unit.name].label}")
        choices[unit.name] = choice
    nbytes = ledger.cost.file_bytes(choices)
    loss = (
        None
        if table is None
        else build_problem(
            table,
            ledger,
            list({c for row in ledger.bytes_of.values() for c in row}),
            lambda _: None,
        ).predict_loss(choices)
    )
    edited = replace(
        plan, choices=choices, predicted_bytes=nbytes, predicted_loss=loss, notes=tuple(notes)
    )
    check_plan(edited, ledger.cost, plan.model_fingerprint)
    over = ledger.count_bytes(choices) - ledger.limit
    if over <= 0:
        return edited
    message = f"the edited plan is {over:,} bytes above {plan.budget.asked}"
    emit(Notice(kind="warning", subject="--set", message=message))
    return replace(edited, budget=Budget(limit_bytes=nbytes, asked=plan.budget.asked))


def _choose(unit: Unit, words: str, ledger: Ledger, table: SensitivityTable | None) -> Candidate:
    sizes = ledger.bytes_of[unit.name]
    scores = {} if table is None else table.scores.get(unit.name, {})
    found = find_choice(words, sizes, scores)
    if found is None:
        raise PlanError(
            f"--set: {unit.name} cannot have {words}",
            allowed=", ".join(candidate.label for candidate in sorted(sizes)),
            hint="more --bits, or another --runtime, offer more",
        )
    return found


def _explain(
    inputs: CompressInputs,
    named: Sequence[Unit],
    plans: Sequence[Plan],
    ledgers: Sequence[Ledger],
    table: SensitivityTable | None,
) -> list[Explanation]:
    if not named or table is None:
        return []
    found = []
    for plan, ledger in zip(plans, ledgers, strict=True):
        problem = _build_problem(inputs, ledger, table)
        found += [explain_unit(unit.name, plan, ledger, problem) for unit in named]
    return found


def _build_problem(
    inputs: CompressInputs, ledger: Ledger, table: SensitivityTable
) -> AllocationProblem:
    return build_problem(table, ledger, inputs.space.candidates, lambda _: None)


def _write(
    outcome: PlansOutcome,
    inputs: CompressInputs,
    tables: Mapping[str, SensitivityTable],
    settings: PlanSettings,
    place: Path,
) -> PlansOutcome:
    """Write plans, front and scores to the directory, whole or not at all."""
    names = {found.target: f"{name_plan(found.target)}.json" for found in outcome.view.planned}
    assert settings.out is not None
    out = settings.out
    outcome = replace(outcome, out=out, paths={t: out / name for t, name in names.items()})
    files = encode_stage_files(inputs.model, inputs.calibration.record, tables, None)
    for target, plan in outcome.plans.items():
        files[names[target]] = json.dumps(plan.to_dict(), indent=1).encode() + b"\n"
    files |= render_plan_files(outcome)
    with create_directory(place, sum(map(len, files.values()))) as folder:
        write_files(folder, files)
    return outcome


def name_plan(target: str) -> str:
    """Return the name of a target's file: `4bit`, `25%`, `120MB`."""
    return target.strip().lower().replace("/", "-").replace(" ", "")
