"""The error of a quantile over windows by brute force: windows drawn with replacement."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence


def naive_quantile(values: Sequence[float], level: float) -> float:
    """Between the two order statistics around (n - 1) * level, in a straight line."""
    ordered, place = sorted(values), (len(values) - 1) * level
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def bootstrap_quantile_error(
    windows: Sequence[Sequence[float]], level: float, resamples: int, seed: int
) -> float:
    """The spread of the quantile over resamples of whole windows."""
    draw = random.Random(seed)
    found = []
    for _ in range(resamples):
        picked = draw.choices(windows, k=len(windows))
        found.append(naive_quantile([value for row in picked for value in row], level))
    return statistics.stdev(found)
