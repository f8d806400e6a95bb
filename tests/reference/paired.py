"""Tango's interval and the paired bootstrap, slowly: by search and by loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binom


def log_likelihood(lost: int, gained: int, samples: int, lost_rate: float, gap: float) -> float:
    """Of a trinomial: `gained` of rate lost_rate + gap, `lost`, and the rest."""
    rates = (lost_rate, lost_rate + gap, 1 - 2 * lost_rate - gap)
    counts = (lost, gained, samples - lost - gained)
    if any(rate < 0 for rate in rates):
        return -math.inf
    pairs = zip(counts, rates, strict=True)
    return sum(n * math.log(rate) if rate else -math.inf for n, rate in pairs if n)


def score(lost: int, gained: int, samples: int, gap: float) -> float:
    """Tango's statistic, the nuisance rate found by maximising the likelihood."""
    bounds = (max(0.0, -gap), (1 - gap) / 2)
    found = minimize_scalar(
        lambda rate: -log_likelihood(lost, gained, samples, rate, gap),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-12},
    )
    candidates = [float(found.x), *bounds]
    rate = max(candidates, key=lambda rate: log_likelihood(lost, gained, samples, rate, gap))
    variance = samples * (2 * rate + gap * (1 - gap))
    return (gained - lost - samples * gap) / math.sqrt(variance)


def mcnemar(lost: int, gained: int) -> float:
    """Twice the smaller tail of Binomial(lost + gained, 1/2), at most 1."""
    total = lost + gained
    tail = sum(binom.pmf(k, total, 0.5) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * float(tail))


def bootstrap(
    value: Callable[[Sequence[int]], float], samples: int, resamples: int, seed: int
) -> list[float]:
    """`value` of the samples picked, drawn as one matrix."""
    picks = np.random.default_rng(seed).integers(samples, size=(resamples, samples))
    return [value(pick.tolist()) for pick in picks]
