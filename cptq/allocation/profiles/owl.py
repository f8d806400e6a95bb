"""`owl`: blocks with more outliers among their scores keep more.

    D_b = share of |w_ij| |x_j| in block b above M times their mean,      M = 5
    density_b = d + 2 lambda ((D_b - min D) / (max D - min D) - mean),      lambda = 0.08

Source: OWL (Yin et al., arXiv 2310.05175, section 3.2), as its code maps ratios: over a
range of 2 lambda, shifted to the mean. Departures: the mean is weighted by what units store, where
its code takes blocks as equal; densities are clipped to [0.01, 1].

Cost: one forward pass for the second moments. Limits: M and lambda are the paper's, for 7B models
at 70%; all layers of a block share a density.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.profiles import Profile, UnitFacts

#: the paper's lambda
SPREAD = 0.08
LEAST = 0.01


def compute(facts: Sequence[UnitFacts], density: float) -> list[float]:
    """Return densities by outlier ratio; the mean for all where no ratio differs."""
    ratios = [fact.outlier_ratio or 0.0 for fact in facts]
    low, high = min(ratios), max(ratios)
    if high == low:
        return [density] * len(facts)
    mapped = [2 * SPREAD * (ratio - low) / (high - low) for ratio in ratios]
    total = sum(fact.size for fact in facts)
    mean = sum(m * fact.size for m, fact in zip(mapped, facts, strict=True)) / total
    return [min(1.0, max(LEAST, density + m - mean)) for m in mapped]


PROFILE = Profile(compute=compute, reads="inputs")
