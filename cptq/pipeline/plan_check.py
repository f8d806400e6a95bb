"""Carry out `--check-uniform`: the plans that it compares, and the ways in which both are tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from cptq.calibration.batches import Batch, count_tokens, split_batches
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.samples import take_batches
from cptq.errors import BudgetError
from cptq.pipeline.carry_out import allocate_plan
from cptq.pipeline.guard import Guard
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.profile import build_masking
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.trial_model import solve_choices
from cptq.pipeline.uniform_check import (
    BASELINE,
    FEW_TOKENS,
    TRIAL_TOKENS,
    Trial,
    keep_better_plan,
)
from cptq.types import Emit, Event, Keep, Notice, Plan, keep_nothing


def check_plan(
    inputs: CompressInputs,
    plan: Plan,
    guard: Guard,
    recorder: Recorder,
    keep: Keep = keep_nothing,
) -> Plan:
    """Return the plan, or the baseline plan where --check-uniform finds that better.

    `keep` keeps what was measured of each.
    """
    with recorder.stage("plan check"):
        baseline = _make_baseline_plan(inputs, plan, recorder)
        if baseline is None:
            return plan
        trials = list_trials(inputs, guard.divergence, recorder)
        return keep_better_plan(plan, baseline, trials, guard.divergence, recorder, keep)


def list_trials(inputs: CompressInputs, divergence: DivergenceFromDense, emit: Emit) -> list[Trial]:
    """Return the trials of --check-uniform."""
    return [
        Trial(tokens=tokens, measure=partial(_try_on, inputs, batches, divergence, emit))
        for tokens, batches in list_trial_texts(inputs).items()
    ]


def list_trial_texts(inputs: CompressInputs) -> dict[int, list[Batch]]:
    """Return {tokens: batches} of the calibration text that plans are tried on, growing."""
    some = split_batches(take_batches(inputs.calibration.batches, TRIAL_TOKENS), FEW_TOKENS)
    taken = [take_batches(some, tokens) for tokens in (FEW_TOKENS, TRIAL_TOKENS)]
    return {count_tokens(batches): batches for batches in taken}


def _try_on(
    inputs: CompressInputs,
    batches: list[Batch],
    divergence: DivergenceFromDense,
    emit: Emit,
    plans: Sequence[Plan],
) -> list[Tensor]:
    """Return the divergence (rows,) of each plan, its units compressed on some batches."""
    settings, part = inputs.settings, replace(inputs.calibration, batches=batches)
    trial = solve_choices(
        inputs.model,
        part,
        settings.compressor,
        inputs.space.cost,
        [plan.choices for plan in plans],
        seed=settings.calibration.seed,
        masking=build_masking(settings),
        emit=emit,
    )
    found = []
    with trial.restore_after():
        for plan in plans:
            trial.apply_choices(plan.choices)
            found.append(divergence.measure_rows())
    return found


def _make_baseline_plan(inputs: CompressInputs, plan: Plan, emit: Emit) -> Plan | None:
    """Return the plan to compare with; None where none is needed, or none can be compared."""
    if not inputs.compare_with_baseline:
        return None
    try:
        baseline = allocate_plan(inputs, BASELINE, None, _ignore)
    except BudgetError:  # of the candidates only sparse ones are small enough
        message = "no plan without sparse weights is so small: nothing to compare with"
        emit(Notice(kind="warning", subject="--check-uniform", message=message))
        return None
    if baseline.choices == plan.choices:
        return None
    if not inputs.held_out.judge:
        message = (
            "no text is left beside what calibrates: the plan is not compared with a uniform "
            "one; fewer --samples or a longer text would leave some"
        )
        emit(Notice(kind="warning", subject="--check-uniform", message=message))
        return None
    return baseline


def _ignore(_event: Event) -> None:
    """Drop notices about allocating the baseline plan, which may not be kept."""
