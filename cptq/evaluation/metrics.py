"""GLUE's metrics with standard errors: values in, numbers out.

Accuracy, F1, Matthews correlation (scikit-learn), Pearson and Spearman correlation (SciPy). The
error of an accuracy is binomial, sqrt(a (1 - a) / n); that of the others the standard deviation
over BOOTSTRAPS resamples of the sentences drawn with replacement, the same ones for the same seed
(`cptq.evaluation.resampling`).
A correlation with a constant is undefined; it is 0 here (scikit-learn's convention for Matthews),
and `is_constant` tells when to say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from cptq.evaluation.resampling import ROW_METRICS, bootstrap

BOOTSTRAPS = 500

Values = NDArray[np.float64]
Metric = Callable[[Values, Values], float]


def is_constant(values: Values) -> bool:
    """Whether all values are the same."""
    return bool((values == values[0]).all())


def accuracy(labels: Values, predictions: Values) -> float:
    """Share of predictions that equal the label."""
    return float(accuracy_score(labels, predictions))


def f1(labels: Values, predictions: Values) -> float:
    """Harmonic mean of precision and recall of the class 1; 0 where nothing of it is found."""
    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def matthews(labels: Values, predictions: Values) -> float:
    """Matthews correlation coefficient, in [-1, 1]."""
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Values, predictions: Values) -> float:
    """Pearson's correlation coefficient, in [-1, 1]; 0 if a side is constant."""
    return _correlation(pearsonr, labels, predictions)


def spearman(labels: Values, predictions: Values) -> float:
    """Spearman's rank correlation coefficient, in [-1, 1]; 0 if a side is constant."""
    return _correlation(spearmanr, labels, predictions)


def _correlation(function: Callable[..., Any], labels: Values, predictions: Values) -> float:
    if is_constant(labels) or is_constant(predictions):
        return 0.0
    return float(function(labels, predictions).statistic)


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def standard_error(name: str, labels: Values, predictions: Values, seed: int) -> float | None:
    """The standard error of a metric in `METRICS`; None for a single sample."""
    if len(labels) < 2:
        return None
    if name == "accuracy":
        share = accuracy(labels, predictions)
        return math.sqrt(share * (1 - share) / len(labels))
    return bootstrap_error(name, labels, predictions, seed)


def error_words(name: str) -> str:
    """How `standard_error` finds it."""
    return "binomial" if name == "accuracy" else f"bootstrap, {BOOTSTRAPS} resamples"


def bootstrap_error(name: str, labels: Values, predictions: Values, seed: int) -> float:
    """Standard deviation of the metric over resamples of the pairs."""
    values = bootstrap(ROW_METRICS[name], labels, predictions, BOOTSTRAPS, seed)
    return float(np.std(values, ddof=1))
