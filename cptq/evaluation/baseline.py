"""A model against a baseline on the same samples: flips, differences, intervals, p-values.

All of it works on results that `cptq.types.join_results` joined.

Flips (Dutta et al. 2024, "Accuracy is not all you need"): two models of the same accuracy can be
right about different questions. A flip is an answer that was right and is wrong, or the other way
round; their share is at least the difference of the two accuracies. Its standard error is that of
a share.

Answers right or wrong (accuracy). With b samples that only the baseline has right (lost) and c that
only the model has right (gained), the difference is (c - b) / n. p is McNemar's exact one: under
"no difference" the c are Binomial(b + c, 1/2) (McNemar 1947). The interval is Tango's score
interval (Tango 1998, "Equivalence test and confidence interval for the difference in proportions
for the paired-sample design"): all D for which |T(D)| is at most the normal quantile,

    T(D) = (c - b - n D) / sqrt(n (2 q + D (1 - D)))

where q is the likelihood's own estimate of b / n once the difference is held at D. Unlike a Wald
interval it keeps a width where no answer differs: z^2 / (n + z^2) to either side.

Everything else: the paired bootstrap of `cptq.evaluation.metrics`, RESAMPLES draws; the interval
is that of percentiles, p twice the smaller share of draws on either side of none. With few samples
(perplexity has one per window) percentiles are too narrow: below FEW of them the method says so.

The numbers depend only on the samples and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from cptq.evaluation.metrics import ROW_METRICS, Values, draw_samples
from cptq.types import (
    ComparedResult,
    Comparison,
    EvalResult,
    PairedDifference,
    PerSample,
    SamplePairs,
    SampleRatios,
)
from cptq.types.samples import build_ratios

LEVEL = 0.95
RESAMPLES = 2000
FEW = 20
#: metrics that are a share of right answers
SHARES = ("acc", "acc_norm", "accuracy")
#: picks (resamples, samples) -> the metric's value on each resample
Resampler = Callable[[NDArray[np.int64]], Values]


def add_flips(joined: Comparison) -> Comparison:
    """Add, after each accuracy, the share of flips where the baseline answered the same samples."""
    rows: list[ComparedResult] = []
    for row in joined.rows:
        rows.append(row)
        if row.result.metric in SHARES and row.baseline is not None and row.same_samples:
            flips = measure_flips(row.result, row.baseline)
            rows += [ComparedResult(result=flips)] if flips is not None else []
    return replace(joined, rows=tuple(rows))


def measure_flips(result: EvalResult, baseline: EvalResult) -> EvalResult | None:
    """Measure the share of answers that flipped; None if single answers were not kept."""
    mine, theirs = find_correct(result), find_correct(baseline)
    if mine is None or theirs is None:
        return None
    flipped = (mine != theirs).astype(np.float64)
    count = len(flipped)
    stderr = float(flipped.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return replace(
        result,
        metric="flips" if result.metric != "acc_norm" else "flips_norm",
        value=float(flipped.mean()),
        stderr=stderr,
        higher_is_better=False,
        per_sample=build_ratios(flipped),
    )


def find_correct(result: EvalResult) -> NDArray[np.bool_] | None:
    """Find which samples were answered correctly; None if the result does not keep that."""
    samples = result.per_sample
    if isinstance(samples, SampleRatios) and not samples.denominators:
        return np.asarray(np.array(samples.numerators) == 1)
    if isinstance(samples, SamplePairs):
        return np.asarray(np.array(samples.labels) == np.array(samples.predictions))
    return None


def add_paired_differences(joined: Comparison, seed: int) -> Comparison:
    """Add the paired difference of every result that has a baseline on the same samples."""
    rows = (_pair(row, seed) for row in joined.rows)
    return replace(joined, rows=tuple(rows))


def _pair(row: ComparedResult, seed: int) -> ComparedResult:
    if row.baseline is None or row.mismatch is not None or row.result.per_sample is None:
        return row
    return replace(row, paired=measure_difference(row.result, row.baseline, seed))


def measure_difference(result: EvalResult, baseline: EvalResult, seed: int) -> PairedDifference:
    """Measure result minus baseline, for two results of the same samples."""
    assert result.per_sample is not None
    assert baseline.per_sample is not None
    if _is_right_or_wrong(result.per_sample) and _is_right_or_wrong(baseline.per_sample):
        return _compare_answers(result, baseline)
    return _resample(result, baseline, seed)


def _is_right_or_wrong(samples: PerSample) -> bool:
    return (
        isinstance(samples, SampleRatios)
        and samples.link == "mean"
        and not samples.denominators
        and set(samples.numerators) <= {0, 1}
    )


def _compare_answers(result: EvalResult, baseline: EvalResult) -> PairedDifference:
    mine, theirs = _read_answers(result), _read_answers(baseline)
    lost, gained = int((theirs > mine).sum()), int((mine > theirs).sum())
    return PairedDifference(
        **_describe(result),
        difference=(gained - lost) / len(mine),
        interval=compute_tango_interval(lost, gained, len(mine)),
        p_value=compute_mcnemar_p(lost, gained),
        samples=len(mine),
        method="McNemar exact; Tango's score interval",
        lost=lost,
        gained=gained,
    )


def _read_answers(result: EvalResult) -> Values:
    assert isinstance(result.per_sample, SampleRatios)
    return np.asarray(result.per_sample.numerators, dtype=np.float64)


def _describe(result: EvalResult) -> dict[str, Any]:
    names = ("task", "version", "metric", "higher_is_better")
    return {name: getattr(result, name) for name in names} | {"level": LEVEL}


def compute_mcnemar_p(lost: int, gained: int) -> float:
    """Compute the exact two-sided p-value; 1 where no answer differs."""
    from scipy.stats import binomtest  # at the head it would slow the start of every command

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def compute_tango_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Compute Tango's score interval of (gained - lost) / samples at LEVEL, within [-1, 1]."""
    z = float(ndtri((1 + LEVEL) / 2))
    value = (gained - lost) / samples

    def beyond(difference: float, limit: float) -> float:
        return compute_tango_statistic(lost, gained, samples, difference) - limit

    low = -1.0 if beyond(-1.0, z) <= 0 else float(brentq(beyond, -1.0, value, args=(z,)))
    high = 1.0 if beyond(1.0, -z) >= 0 else float(brentq(beyond, value, 1.0, args=(-z,)))
    return low, high


def compute_tango_statistic(lost: int, gained: int, samples: int, difference: float) -> float:
    """Compute T(D), which falls from above to below 0 as D grows."""
    a = 2.0 * samples
    b = (2 * samples - (gained - lost)) * difference - (lost + gained)
    c = -lost * difference * (1 - difference)
    held = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    above = gained - lost - samples * difference
    variance = samples * (2 * held + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def _resample(result: EvalResult, baseline: EvalResult, seed: int) -> PairedDifference:
    mine, theirs = _make_resampler(result), _make_resampler(baseline)
    samples = len(result.per_sample or ())
    both = [mine(pick) - theirs(pick) for pick in draw_samples(samples, RESAMPLES, seed)]
    found_R = np.concatenate(both)
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(found_R, (edge, 1 - edge))
    few = f"; only {samples} samples, so the interval is too narrow" if samples < FEW else ""
    return PairedDifference(
        **_describe(result),
        difference=result.value - baseline.value,
        interval=(float(low), float(high)),
        p_value=_compute_p(found_R),
        samples=samples,
        method=f"paired bootstrap, {RESAMPLES} resamples, percentiles{few}",
    )


def _make_resampler(result: EvalResult) -> Resampler:
    """Make the function that computes the result's metric on resamples."""
    samples = result.per_sample
    if isinstance(samples, SamplePairs):
        labels, predictions = np.asarray(samples.labels, float), np.asarray(samples.predictions)
        metric = ROW_METRICS[result.metric]
        return lambda pick: metric(labels[pick], predictions[pick].astype(float))
    assert samples is not None
    above = np.asarray(samples.numerators, dtype=np.float64)
    below = np.asarray(samples.denominators or np.ones(len(above)), dtype=np.float64)
    link = _LINKS[samples.link]
    return lambda pick: link(above[pick].sum(-1) / below[pick].sum(-1))


_LINKS: dict[str, Callable[[Values], Values]] = {
    "mean": lambda ratio: ratio,
    "exp": np.exp,
    "bits": lambda ratio: ratio / math.log(2),
}


def _compute_p(found_R: Values) -> float:
    """Two-sided; never below what RESAMPLES can resolve (Davison & Hinkley 1997, eq. 4.11)."""
    side = min((found_R <= 0).sum(), (found_R >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(found_R) + 1)))
