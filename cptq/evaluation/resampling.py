"""The bootstrap: GLUE's metrics along the last axis, and many resamples at once.

A resample draws as many samples as there are, with replacement; its value is one draw of what the
metric could have been on other samples of the same kind (Efron & Tibshirani 1993, chapters 6, 13).
scikit-learn and SciPy give the metrics themselves (`cptq.evaluation.metrics`); here they are
written once more for arrays (..., samples), so that thousands of resamples take a second, and are
tested against them.

Two models are compared by the *paired* bootstrap: one draw picks the same samples for both, so
that how hard a sample is cancels (Koehn 2004, section 3; Berg-Kirkpatrick et al. 2012).

Cost: O(resamples * samples), for Spearman with a sort; BATCH_ELEMENTS numbers in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Values = NDArray[np.float64]
RowMetric = Callable[[Values, Values], Values]

BATCH_ELEMENTS = 2_000_000


def accuracy(labels: Values, predictions: Values) -> Values:
    """Share of equal ones along the last axis."""
    return np.asarray((labels == predictions).mean(-1))


def f1(labels: Values, predictions: Values) -> Values:
    """2 TP / (2 TP + FP + FN) of the class 1; 0 where it neither is nor is predicted."""
    found, true = predictions == 1, labels == 1
    return _ratio(2.0 * (found & true).sum(-1), found.sum(-1) + true.sum(-1))


def matthews(labels: Values, predictions: Values) -> Values:
    """Gorodkin's R_K of any number of classes (2004, equation 8); 0 where a side is constant."""
    size = float(labels.shape[-1])
    correct = (labels == predictions).sum(-1)
    is_k = [(labels == k, predictions == k) for k in np.union1d(labels, predictions)]
    true = np.stack([a.sum(-1) for a, _ in is_k]).astype(float)
    found = np.stack([b.sum(-1) for _, b in is_k]).astype(float)
    spread = (size**2 - (true**2).sum(0)) * (size**2 - (found**2).sum(0))
    return _ratio(correct * size - (true * found).sum(0), np.sqrt(spread))


def pearson(labels: Values, predictions: Values) -> Values:
    """Pearson's correlation; 0 where a side is constant."""
    a = labels - labels.mean(-1, keepdims=True)
    b = predictions - predictions.mean(-1, keepdims=True)
    constant = (np.ptp(labels, -1) == 0) | (np.ptp(predictions, -1) == 0)
    found = _ratio((a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))
    return np.where(constant, 0.0, found)


def spearman(labels: Values, predictions: Values) -> Values:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    return pearson(rankdata(labels, axis=-1), rankdata(predictions, axis=-1))


def _ratio(above: Any, below: Any) -> Values:
    below = np.asarray(below, dtype=np.float64)
    found: Values = np.divide(above, below, out=np.zeros_like(below), where=below > 0)
    return found


ROW_METRICS: Mapping[str, RowMetric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def draws(samples: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """(some, samples) indices at a time, `resamples` rows in all; the same ones for a seed."""
    generator = np.random.default_rng(seed)
    at_once = max(1, BATCH_ELEMENTS // samples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        yield generator.integers(samples, size=(rows, samples))


def bootstrap(
    metric: RowMetric, labels: Values, predictions: Values, resamples: int, seed: int
) -> Values:
    """(resamples,) values of the metric."""
    picked = draws(len(labels), resamples, seed)
    return np.concatenate([metric(labels[pick], predictions[pick]) for pick in picked])
