"""A model against a baseline on the same samples: difference, interval, p-value.

Answers right or wrong (accuracy). With b samples that only the baseline has right (lost) and c that
only the model has right (gained), the difference is (c - b) / n. p is McNemar's exact one: under
"no difference" the c are Binomial(b + c, 1/2) (McNemar 1947). The interval is Tango's score
interval (Tango 1998, "Equivalence test and confidence interval for the difference in proportions
for the paired-sample design"): all D for which |T(D)| is at most the normal quantile,

    T(D) = (c - b - n D) / sqrt(n (2 q + D (1 - D)))

where q is the likelihood's own estimate of b / n once the difference is held at D. Unlike a Wald
interval it keeps a width where no answer differs: z^2 / (n + z^2) to either side.

Everything else: the paired bootstrap of `cptq.evaluation.resampling`, RESAMPLES draws; the interval
is that of percentiles, p twice the smaller share of draws on either side of none. With few samples
(perplexity has one per window) percentiles are too narrow: below FEW of them the method says so.

No number depends on anything but the samples and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from cptq.evaluation.resampling import ROW_METRICS, Values, draws
from cptq.types import EvalResult
from cptq.types.comparison import PairedDifference
from cptq.types.samples import PerSample, SamplePairs, SampleRatios

LEVEL = 0.95
RESAMPLES = 2000
FEW = 20
Both = Callable[[NDArray[np.int64]], Values]


def compare_results(
    results: Iterable[EvalResult], baseline: Iterable[EvalResult], seed: int
) -> tuple[list[PairedDifference], list[str]]:
    """The differences of all results that can be paired, and why others cannot."""
    known = {(row.task, row.metric): row for row in baseline}
    found, reasons = [], []
    for row in results:
        other = known.get((row.task, row.metric))
        if other is None or row.per_sample is None:
            continue
        reason = why_not(row, other)
        if reason is None:
            found.append(paired_difference(row, other, seed))
        else:
            reasons.append(f"{row.task} {row.metric}: {reason}")
    return found, reasons


def why_not(result: EvalResult, baseline: EvalResult) -> str | None:
    """Why two results of a task cannot be compared sample by sample; None: they can."""
    mine, theirs = result.per_sample, baseline.per_sample
    if mine is None or theirs is None:
        return "no values of single samples were kept"
    if result.version != baseline.version:
        return f"versions {result.version} and {baseline.version} of the task"
    if result.data_fingerprint is None or result.data_fingerprint != baseline.data_fingerprint:
        return "the samples are not the same (other data, or another tokenizer's windows)"
    if type(mine) is not type(theirs) or len(mine) != len(theirs):
        return f"{len(mine)} and {len(theirs)} samples"
    if not (math.isfinite(result.value) and math.isfinite(baseline.value)):
        return "a value is not finite"
    return "one sample alone has no spread" if len(mine) < 2 else None


def paired_difference(result: EvalResult, baseline: EvalResult, seed: int) -> PairedDifference:
    """Result minus baseline, for two results that `why_not` lets pass."""
    assert result.per_sample is not None
    assert baseline.per_sample is not None
    if _is_right_or_wrong(result.per_sample) and _is_right_or_wrong(baseline.per_sample):
        return _answers(result, baseline)
    return _resampled(result, baseline, seed)


def _is_right_or_wrong(samples: PerSample) -> bool:
    return (
        isinstance(samples, SampleRatios)
        and samples.link == "mean"
        and not samples.denominators
        and set(samples.numerators) <= {0, 1}
    )


def _answers(result: EvalResult, baseline: EvalResult) -> PairedDifference:
    mine, theirs = _right(result), _right(baseline)
    lost, gained = int((theirs > mine).sum()), int((mine > theirs).sum())
    return PairedDifference(
        **_head(result),
        difference=(gained - lost) / len(mine),
        interval=tango_interval(lost, gained, len(mine)),
        p_value=mcnemar(lost, gained),
        samples=len(mine),
        method="McNemar exact; Tango's score interval",
        lost=lost,
        gained=gained,
    )


def _right(result: EvalResult) -> Values:
    assert isinstance(result.per_sample, SampleRatios)
    return np.asarray(result.per_sample.numerators, dtype=np.float64)


def _head(result: EvalResult) -> dict[str, Any]:
    names = ("task", "version", "metric", "higher_is_better")
    return {name: getattr(result, name) for name in names} | {"level": LEVEL}


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value; 1 where no answer differs."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def tango_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Tango's score interval of (gained - lost) / samples at LEVEL, within [-1, 1]."""
    z = float(norm.ppf((1 + LEVEL) / 2))
    value = (gained - lost) / samples

    def beyond(difference: float, limit: float) -> float:
        return tango_statistic(lost, gained, samples, difference) - limit

    low = -1.0 if beyond(-1.0, z) <= 0 else float(brentq(beyond, -1.0, value, args=(z,)))
    high = 1.0 if beyond(1.0, -z) >= 0 else float(brentq(beyond, value, 1.0, args=(-z,)))
    return low, high


def tango_statistic(lost: int, gained: int, samples: int, difference: float) -> float:
    """T(D): falls from above to below 0 as D grows."""
    a = 2.0 * samples
    b = (2 * samples - (gained - lost)) * difference - (lost + gained)
    c = -lost * difference * (1 - difference)
    held = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    above = gained - lost - samples * difference
    variance = samples * (2 * held + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def _resampled(result: EvalResult, baseline: EvalResult, seed: int) -> PairedDifference:
    mine, theirs = _values(result), _values(baseline)
    samples = len(result.per_sample or ())
    both = [mine(pick) - theirs(pick) for pick in draws(samples, RESAMPLES, seed)]
    found_R = np.concatenate(both)
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(found_R, (edge, 1 - edge))
    few = f"; only {samples} samples, so the interval is too narrow" if samples < FEW else ""
    return PairedDifference(
        **_head(result),
        difference=result.value - baseline.value,
        interval=(float(low), float(high)),
        p_value=_p_value(found_R),
        samples=samples,
        method=f"paired bootstrap, {RESAMPLES} resamples, percentiles{few}",
    )


def _values(result: EvalResult) -> Both:
    """A function picks (resamples, samples) -> (resamples,) values."""
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


def _p_value(found_R: Values) -> float:
    """Two-sided; never below what RESAMPLES can tell (Davison & Hinkley 1997, equation 4.11)."""
    side = min((found_R <= 0).sum(), (found_R >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(found_R) + 1)))
