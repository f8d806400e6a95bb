"""Measure how well a score ranks: Spearman's rho and Kendall's tau-b, within widths and pooled.

Pooled over widths every score correlates with the measured divergence, since every score falls with
the number of bits. An allocator also needs to know which of two units at the SAME width loses more.
So both are given: `pooled` over all pairs, and `within`, the mean over the widths of the
correlation among the pairs of one width, weighted by their number.

The interval is a percentile bootstrap: units are drawn with replacement, each with all of its pairs
(pairs of one unit are not independent), the statistic is computed anew, and the middle 95% of
`RESAMPLES` draws is the interval. It covers the choice of units, not the noise of each measured
divergence or the choice of text.

A constant score ranks nothing: its correlation is given as 0. A width with fewer than three pairs
is left out.

Sources: Kendall 1945 (tau-b, ties); equal to scipy.stats, which the tests compare with. Own code as
the bootstrap needs thousands of calls and no p-values. Cost: n^2 per tau, n below 1,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cptq.types import Agreement, Interval

RESAMPLES = 400
#: fewest pairs of one width whose correlation is used
MIN_PAIRS = 3

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats, Floats], float]


def compute_spearman(x: Floats, y: Floats) -> float:
    """Return the correlation of ranks, ties sharing their mean rank; 0 where either is constant."""
    from scipy.stats import rankdata  # at the head it would slow the start of every command

    return _compute_cosine(_center(rankdata(x)), _center(rankdata(y)))


def compute_kendall(x: Floats, y: Floats) -> float:
    """Return Kendall's tau-b; 0 where either is constant."""
    return _compute_cosine(np.sign(x[:, None] - x).ravel(), np.sign(y[:, None] - y).ravel())


def _center(values: Floats) -> Floats:
    return np.asarray(values - values.mean(), dtype=np.float64)


def _compute_cosine(a: Floats, b: Floats) -> float:
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


def average_within(
    statistic: Statistic, strata: npt.NDArray[np.int64], x: Floats, y: Floats
) -> float | None:
    """Return the statistic within strata, averaged by size; None if no stratum has enough pairs."""
    total = weight = 0.0
    for stratum in np.unique(strata):
        mine = strata == stratum
        size = int(mine.sum())
        if size >= MIN_PAIRS:
            total += size * statistic(x[mine], y[mine])
            weight += size
    return total / weight if weight else None


def measure_agreement(
    metric: str,
    units: Sequence[str],
    widths: Sequence[int],
    scores: Sequence[float],
    measured: Sequence[float],
    *,
    seconds: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Agreement:
    """Return all four correlations of one metric with their intervals.

    Args:
        metric: its name.
        units, widths, scores, measured: one entry per pair; pairs of one candidate have one width.
        seconds: wall time of the run that measured the metric.
        seed: seed of the bootstrap; the same draws for every metric.
        resamples: how many draws.
    """
    strata = np.asarray(widths, dtype=np.int64)
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    draws = resample(units, resamples, seed)

    def interval(pooled: bool, statistic: Statistic) -> Interval:
        def value(rows: npt.NDArray[np.int64]) -> float | None:
            if pooled:
                return statistic(x[rows], y[rows])
            return average_within(statistic, strata[rows], x[rows], y[rows])

        return _estimate_interval(value, np.arange(len(x)), draws)

    return Agreement(
        metric=metric,
        pairs=len(x),
        spearman_within=interval(False, compute_spearman),
        kendall_within=interval(False, compute_kendall),
        spearman_pooled=interval(True, compute_spearman),
        kendall_pooled=interval(True, compute_kendall),
        seconds=seconds,
    )


def resample(units: Sequence[str], resamples: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each draw: as many units as there are, with replacement, with all rows."""
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(units):
        rows.setdefault(unit, []).append(row)
    groups = list(rows.values())
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(groups), size=(resamples, len(groups)))
    return [np.array([row for k in pick for row in groups[k]], dtype=np.int64) for pick in picks]


def _estimate_interval(
    value: Callable[[npt.NDArray[np.int64]], float | None],
    everything: npt.NDArray[np.int64],
    draws: Sequence[npt.NDArray[np.int64]],
) -> Interval:
    point = value(everything)
    found = [drawn for rows in draws if (drawn := value(rows)) is not None]
    if point is None or not found:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value=point, low=float(low), high=float(high))
