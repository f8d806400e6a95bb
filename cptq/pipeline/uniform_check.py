"""`--check-uniform`: keep the better plan, the mixed one or the baseline plan that needs no scores.

Both are carried out by the run's own compressor on a part of the calibration text
(`TRIAL_TOKENS`), and compared on held-out text that neither calibrated nor chose; the better one is
then carried out on all of it. The baseline plan is `even`: uniform where the target is a whole
number of bits, otherwise two neighbouring widths spread over depth, so that both take the same
bytes.

From less text both plans come out worse, so that their divergences are those of the trial, not of
what is shipped. What is decided is their order, for which a part of the text is enough where all
of it costs twice a compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.checkpoint.model import LoadedModel
from cptq.report.formatting import format_number
from cptq.types import Emit, Event, Keep, Notice, Plan, Progress, keep_nothing

#: the allocator of the baseline plan
BASELINE = "even"
#: tokens of the calibration text that both plans are tried on
TRIAL_TOKENS = 8192

#: carries a plan out on the model in memory
Compress = Callable[[Plan, Emit], object]


def keep_better_plan(
    model: LoadedModel,
    plan: Plan,
    baseline: Plan,
    compress: Compress,
    divergence: DivergenceFromDense,
    emit: Emit,
    keep: Keep = keep_nothing,
) -> Plan:
    """Carry out both plans and return the better one; `model` is dense again afterwards.

    Args:
        model: dense.
        plan: the mixed plan; at equal divergence it is kept.
        baseline: the plan that needs no scores.
        compress: carries a plan out on the dense model, whose weights it changes.
        divergence: from the dense model, on held-out text.
        emit: receives progress and the result; what a trial has to say about its layers is dropped.
        keep: keeps the divergences of each plan.
    """

    def try_out(tried: Plan) -> Tensor:
        compress(tried, partial(_show_progress, emit, tried.allocator))
        found = divergence.measure_rows()
        model.restore_dense()
        return found

    own_R = keep("trial-of-plan", partial(try_out, plan))
    other_R = keep("trial-of-baseline", partial(try_out, baseline))
    better = plan if float(own_R.mean()) <= float(other_R.mean()) else baseline
    note = _describe_result(own_R, other_R, baseline, divergence)
    emit(note)
    return replace(better, notes=(*better.notes, note.message))


def _show_progress(emit: Emit, allocator: str, event: Event) -> None:
    if isinstance(event, Progress):
        emit(replace(event, stage=f"trial of {allocator}"))


def _describe_result(
    own_R: Tensor, other_R: Tensor, baseline: Plan, divergence: DivergenceFromDense
) -> Notice:
    own, other = float(own_R.mean()), float(other_R.mean())
    labels = {c.label for c in baseline.choices.values() if not c.float8}
    rival = f"uniform {labels.pop()}" if len(labels) == 1 else "two widths spread evenly"
    numbers = (
        f"{format_number(own)} against {format_number(other)} "
        f"{divergence.unit} ({divergence.describe_difference(own_R - other_R)})"
    )
    if own <= other:
        message = f"the mixed plan is kept: {numbers} of {rival} at the same bytes"
        return Notice(kind="info", subject="--check-uniform", message=message)
    message = f"the mixed plan loses to {rival} at the same bytes, {numbers}: the latter is shipped"
    return Notice(kind="warning", subject="--check-uniform", message=message)
