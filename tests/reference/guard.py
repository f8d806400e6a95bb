"""What a changed model lost, row by row, with plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t


def log_softmax(z: Sequence[float]) -> list[float]:
    """Return the log-probabilities of one row of logits."""
    top = max(z)
    total = math.log(math.fsum(math.exp(x - top) for x in z)) + top
    return [x - total for x in z]


def compute_kl(dense: Sequence[float], own: Sequence[float]) -> float:
    """Return KL(dense || own) of two rows of logits."""
    p, q = log_softmax(dense), log_softmax(own)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def estimate_mean(windows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over the rows of all windows, its standard error and half its interval."""
    count = sum(map(len, windows))
    mean = math.fsum(math.fsum(rows) for rows in windows) / count
    excess = math.fsum((math.fsum(rows) - mean * len(rows)) ** 2 for rows in windows)
    number = len(windows)
    error = math.sqrt(excess * number / (number - 1)) / count
    return mean, error, float(t.ppf(0.975, number - 1)) * error


def compute_depth(dense: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> list[float]:
    """Return sum |h' - h|^2 / sum |h|^2 of hidden states before block 0 and after each block."""
    found = []
    for h, changed in zip(dense, own, strict=True):
        h, changed = h.astype(np.float64), changed.astype(np.float64)
        found.append(float(((changed - h) ** 2).sum() / (h**2).sum()))
    return found
