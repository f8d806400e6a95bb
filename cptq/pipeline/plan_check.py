"""Carry out `--check-uniform`: the plans that it compares, and the ways in which both are tried."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cptq.calibration.batches import Batch, count_tokens
from cptq.calibration.samples import take_batches
from cptq.calibration.tokens import Calibration
from cptq.errors import BudgetError
from cptq.pipeline.carry_out import allocate_plan, carry_out
from cptq.pipeline.guard import Guard
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
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
        return keep_better_plan(
            inputs.model,
            plan,
            baseline,
            list_trials(inputs),
            guard.divergence,
            recorder,
            keep,
        )


def list_trials(inputs: CompressInputs) -> list[Trial]:
    """Return the trials of --check-uniform."""
    return [
        Trial(
            tokens=tokens,
            compress=partial(_try_on, inputs, replace(inputs.calibration, batches=batches)),
        )
        for tokens, batches in list_trial_texts(inputs).items()
    ]


def list_trial_texts(inputs: CompressInputs) -> dict[int, list[Batch]]:
    """Return {tokens: batches} of the calibration text that plans are tried on, growing."""
    taken = [take_batches(inputs.calibration.batches, n) for n in (FEW_TOKENS, TRIAL_TOKENS)]
    return {count_tokens(batches): batches for batches in taken}


def _try_on(inputs: CompressInputs, part: Calibration, plan: Plan, emit: Emit) -> None:
    carry_out(inputs, plan, part, (), emit, measure_output=False)


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
