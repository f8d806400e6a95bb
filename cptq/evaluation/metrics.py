"""GLUE's metrics with standard errors, and the bootstrap: values in, numbers out.

Accuracy, F1, Matthews correlation (scikit-learn), Pearson and Spearman correlation (SciPy). The
error of an accuracy is binomial, sqrt(a (1 - a) / n); that of the others the standard deviation
over BOOTSTRAPS resamples of the sentences drawn with replacement, the same ones for the same seed.
A correlation with a constant is undefined; it is 0 here (scikit-learn's convention for Matthews),
and `is_constant` detects it, so that a notice can say so.

A resample draws as many samples as there are, with replacement; its value is one draw of what the
metric could have been on other samples of the same kind (Efron & Tibshirani 1993, chapters 6, 13).
For the resamples each metric is implemented once more over arrays (..., samples), `ROW_METRICS`, so
that thousands of them take a second; these are tested against the libraries.

Two models are compared by the *paired* bootstrap: one draw picks the same samples for both, so
that how hard a sample is cancels (Koehn 2004, section 3; Berg-Kirkpatrick et al. 2012).

Cost: O(resamples * samples), for Spearman with a sort; BATCH_ELEMENTS numbers in memory at once.
The libraries are imported where they are used: at the head they would add 1.5 s to the start of
every command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAPS = 500
BATCH_ELEMENTS = 2_000_000

Values = NDArray[np.float64]
Metric = Callable[[Values, Values], float]
RowMetric = Callable[[Values, Values], Values]


def is_constant(values: Values) -> bool:
    """Whether all values are the same."""
    return bool((values == values[0]).all())


def compute_accuracy(labels: Values, predictions: Values) -> float:
    """Share of predictions that equal the label."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def compute_f1(labels: Values, predictions: Values) -> float:
    """Harmonic mean of precision and recall of the class 1; 0 where nothing of it is found."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def compute_matthews(labels: Values, predictions: Values) -> float:
    """Matthews correlation coefficient, in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def compute_pearson(labels: Values, predictions: Values) -> float:
    """Pearson's correlation coefficient, in [-1, 1]; 0 if a side is constant."""
    from scipy.stats import pearsonr

    return _compute_correlation(pearsonr, labels, predictions)


def compute_spearman(labels: Values, predictions: Values) -> float:
    """Spearman's rank correlation coefficient, in [-1, 1]; 0 if a side is constant."""
    from scipy.stats import spearmanr

    return _compute_correlation(spearmanr, labels, predictions)


def _compute_correlation(
    function: Callable[..., Any], labels: Values, predictions: Values
) -> float:
    if is_constant(labels) or is_constant(predictions):
        return 0.0
    return float(function(labels, predictions).statistic)


METRICS: Mapping[str, Metric] = {
    "accuracy": compute_accuracy,
    "f1": compute_f1,
    "matthews": compute_matthews,
    "pearson": compute_pearson,
    "spearman": compute_spearman,
}


def _compute_accuracy_rows(labels: Values, predictions: Values) -> Values:
    """Share of equal ones along the last axis."""
    return np.asarray((labels == predictions).mean(-1))


def _compute_f1_rows(labels: Values, predictions: Values) -> Values:
    """2 TP / (2 TP + FP + FN) of the class 1; 0 where it neither is nor is predicted."""
    found, true = predictions == 1, labels == 1
    return _divide(2.0 * (found & true).sum(-1), found.sum(-1) + true.sum(-1))


def _compute_matthews_rows(labels: Values, predictions: Values) -> Values:
    """Gorodkin's R_K of any number of classes (2004, equation 8); 0 where a side is constant."""
    size = float(labels.shape[-1])
    correct = (labels == predictions).sum(-1)
    is_k = [(labels == k, predictions == k) for k in np.union1d(labels, predictions)]
    true = np.stack([a.sum(-1) for a, _ in is_k]).astype(float)
    found = np.stack([b.sum(-1) for _, b in is_k]).astype(float)
    spread = (size**2 - (true**2).sum(0)) * (size**2 - (found**2).sum(0))
    return _divide(correct * size - (true * found).sum(0), np.sqrt(spread))


def _compute_pearson_rows(labels: Values, predictions: Values) -> Values:
    """Pearson's correlation; 0 where a side is constant."""
    a = labels - labels.mean(-1, keepdims=True)
    b = predictions - predictions.mean(-1, keepdims=True)
    constant = (np.ptp(labels, -1) == 0) | (np.ptp(predictions, -1) == 0)
    found = _divide((a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))
    return np.where(constant, 0.0, found)


def _compute_spearman_rows(labels: Values, predictions: Values) -> Values:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return _compute_pearson_rows(rankdata(labels, axis=-1), rankdata(predictions, axis=-1))


def _divide(above: Any, below: Any) -> Values:
    below = np.asarray(below, dtype=np.float64)
    found: Values = np.divide(above, below, out=np.zeros_like(below), where=below > 0)
    return found


ROW_METRICS: Mapping[str, RowMetric] = {
    "accuracy": _compute_accuracy_rows,
    "f1": _compute_f1_rows,
    "matthews": _compute_matthews_rows,
    "pearson": _compute_pearson_rows,
    "spearman": _compute_spearman_rows,
}


def draw_samples(samples: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draw `resamples` rows of indices, (some, samples) at a time; the same ones for a seed."""
    generator = np.random.default_rng(seed)
    at_once = max(1, BATCH_ELEMENTS // samples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        yield generator.integers(samples, size=(rows, samples))


def bootstrap(
    metric: RowMetric, labels: Values, predictions: Values, resamples: int, seed: int
) -> Values:
    """Compute the metric of each resample: (resamples,) values."""
    picked = draw_samples(len(labels), resamples, seed)
    return np.concatenate([metric(labels[pick], predictions[pick]) for pick in picked])


def estimate_standard_error(
    name: str, labels: Values, predictions: Values, seed: int
) -> float | None:
    """Estimate the standard error of a metric in `METRICS`; None for a single sample."""
    if len(labels) < 2:
        return None
    if name == "accuracy":
        share = compute_accuracy(labels, predictions)
        return math.sqrt(share * (1 - share) / len(labels))
    return bootstrap_standard_error(name, labels, predictions, seed)


def describe_standard_error(name: str) -> str:
    """Describe how `estimate_standard_error` computes it."""
    return "binomial" if name == "accuracy" else f"bootstrap, {BOOTSTRAPS} resamples"


def bootstrap_standard_error(name: str, labels: Values, predictions: Values, seed: int) -> float:
    """Compute the standard deviation of the metric over resamples of the pairs."""
    values = bootstrap(ROW_METRICS[name], labels, predictions, BOOTSTRAPS, seed)
    return float(np.std(values, ddof=1))
