"""Optimal k-means clusters of numbers.

In one dimension the clusters of the optimum are contiguous runs of the sorted numbers, so it is
found exactly by dynamic programming over the cut points (Wang and Song, "Ckmeans.1d.dp", The R
Journal 3/2, 2011): deterministic, without random starts or local optima. Cost O(k n^2) for n
numbers, n in the hundreds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]


def cluster_line(values: list[float], clusters: int) -> list[int]:
    """Return the cluster of every value, 0 for the cluster of smallest centre.

    Args:
        values: finite numbers.
        clusters: the most clusters; equal values are never separated.

    Returns:
        One number per value, in 0 .. clusters - 1, increasing with the value.
    """
    distinct, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    groups = min(clusters, len(distinct))
    if not groups:
        return []
    cuts = _find_cuts(_measure_runs(distinct.astype(np.float64), counts.astype(np.float64)), groups)
    labels = np.searchsorted(cuts, np.arange(len(distinct)), side="right")
    return [int(label) for label in labels[places]]


def _measure_runs(values: _Floats, counts: _Floats) -> _Floats:
    """Return cost[i, j]: the squared distances of values i .. j - 1 from their mean, by counts."""
    # centred first: a difference of large sums would lose the digits that separate the clusters
    centred = values - np.average(values, weights=counts)
    weight, first, second = (
        np.concatenate([[0.0], np.cumsum(counts * centred**power)]) for power in (0, 1, 2)
    )
    w, a, b = (sums[None, :] - sums[:, None] for sums in (weight, first, second))
    cost = np.where(w > 0, b - a * a / np.where(w > 0, w, 1.0), np.inf)
    return np.maximum(cost, 0.0)


def _find_cuts(cost: _Floats, groups: int) -> list[int]:
    """Return the first value of each cluster but the first, at the least total cost."""
    best, choices = cost[0], []
    for _ in range(groups - 1):
        totals = best[:, None] + cost
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    cuts, end = [], cost.shape[0] - 1
    for choice in reversed(choices):
        end = int(choice[end])
        cuts.append(end)
    return cuts[::-1]
