"""`--check-uniform`: keep the better plan, the mixed one or the baseline plan that needs no scores.

Both are compared on held-out text that neither calibrated nor chose; the better one is then carried
out on all of the calibration text. The baseline plan is `even`: uniform where the
target is a whole number of bits, otherwise two neighbouring widths spread over depth, so that both
take the same bytes.

A trial compresses what both plans ask for by the run's own compressor, each unit on what the dense
model gives it (`pipeline.trial_model`), on the first `FEW_TOKENS` of the calibration text; and
where the difference d of their divergences is not plain, again on `TRIAL_TOKENS` of it, which
decides. It is plain if |d| > `ERRORS` SE(d), paired over the windows of the held-out text
(`numerics.standard_error`), and above `SHARE` of the larger divergence.

What is shipped is compressed block after block on more text, by a compressor that may correct the
errors that arrive, and loses less. What is decided is the order of two plans, which was the same
in 18 of 20 cases, and within two standard errors in the others (docs/sensitivity.md). Units that
both plans give the same are compressed once, and the text passes the model once: on
smollm2-135m 69 to 74 seconds, where carrying both plans out on as much text took 154.

Rounding both plans to nearest, which needs no text, is no first trial: at 4 bits on
smollm2-135m-dithered it gives 0.529 and 0.517 (1.1 SE apart), at 3 bits on stories260k 0.889 and
0.879, where the compressor gives 0.356 and 0.414. A plan counts on what the compressor corrects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.numerics.standard_error import compute_standard_error
from cptq.report.formatting import format_number
from cptq.types import Emit, Keep, Notice, Plan, keep_nothing

#: the allocator of the baseline plan
BASELINE = "even"
#: tokens of the calibration text that both plans are tried on: at first, and at most
FEW_TOKENS, TRIAL_TOKENS = 2048, 8192
#: standard errors, and share of the larger divergence, that a plain difference exceeds
ERRORS, SHARE = 2.0, 0.05

#: gives the divergence (rows,) of each of some plans
Measure = Callable[[Sequence[Plan]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to try plans: by `measure`, on so many tokens."""

    tokens: int
    measure: Measure


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """The divergence (rows,) of both plans in one trial."""

    own_R: Tensor
    other_R: Tensor

    @property
    def wins(self) -> bool:
        """Whether the mixed plan is no worse."""
        return float(self.own_R.mean()) <= float(self.other_R.mean())

    def is_plain(self, window_R: Tensor) -> bool:
        """Whether the difference is more than chance; `window_R`: the window of each row."""
        if int(window_R[-1]) < 1:  # chance cannot be told from one window
            return False
        gap_R = self.own_R - self.other_R
        larger = max(float(self.own_R.mean()), float(self.other_R.mean()))
        least = max(ERRORS * compute_standard_error(gap_R, window_R), SHARE * larger)
        return abs(float(gap_R.mean())) > least


def keep_better_plan(
    plan: Plan,
    baseline: Plan,
    trials: Sequence[Trial],
    divergence: DivergenceFromDense,
    emit: Emit,
    keep: Keep = keep_nothing,
) -> Plan:
    """Try both plans and return the better one.

    Args:
        plan: the mixed plan; at equal divergence it is kept.
        baseline: the plan that needs no scores.
        trials: from the cheapest to the one that decides in any case.
        divergence: what the trials measure, on held-out text.
        emit: receives the result.
        keep: keeps the divergences of each trial.
    """
    for trial in trials:
        found = _Found(*keep(f"trial-{trial.tokens}", partial(trial.measure, (plan, baseline))))
        if trial is trials[-1] or found.is_plain(divergence.window_R):
            break
    note = _describe_result(trial, found, baseline, divergence)
    emit(note)
    better = plan if found.wins else baseline
    return replace(better, notes=(*better.notes, note.message))


def _describe_result(
    trial: Trial, found: _Found, baseline: Plan, divergence: DivergenceFromDense
) -> Notice:
    own_R, other_R = found.own_R, found.other_R
    labels = {c.label for c in baseline.choices.values() if not c.float8}
    rival = f"uniform {labels.pop()}" if len(labels) == 1 else "two widths spread evenly"
    numbers = (
        f"{format_number(float(own_R.mean()))} against {format_number(float(other_R.mean()))} "
        f"{divergence.unit} ({divergence.describe_difference(own_R - other_R)}; "
        f"calibrated on {trial.tokens:,})"
    )
    if found.wins:
        message = f"the mixed plan is kept: {numbers} of {rival} at the same bytes"
        return Notice(kind="info", subject="--check-uniform", message=message)
    message = f"the mixed plan loses to {rival} at the same bytes, {numbers}: the latter is shipped"
    return Notice(kind="warning", subject="--check-uniform", message=message)
