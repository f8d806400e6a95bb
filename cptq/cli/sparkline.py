"""A row of small bars as text, one per block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, log

BARS = "▁▂▃▄▅▆▇█"
WIDEST = 60
#: bars show the logarithm where the largest value is this many times the smallest
LOG_RATIO = 30.0


def draw_sparkline(values: Sequence[float]) -> tuple[str, bool]:
    """Return the bars and whether they show logarithms; values that are not finite become `?`.

    Rows longer than `WIDEST` are shortened to the maximum of neighbours.
    """
    rows = _shorten(values)
    finite = [value for value in rows if isfinite(value)]
    if not finite:
        return "?" * len(rows), False
    logs = min(finite) > 0 and max(finite) / min(finite) > LOG_RATIO
    seen = [log(value) if logs and isfinite(value) else value for value in rows]
    low = min(value for value in seen if isfinite(value)) if logs else min(0.0, *finite, 0.0)
    high = max(value for value in seen if isfinite(value))
    return "".join(_choose_bar(value, low, high) for value in seen), logs


def _choose_bar(value: float, low: float, high: float) -> str:
    if not isfinite(value):
        return "?"
    share = (value - low) / (high - low) if high > low else 0.0
    return BARS[round(share * (len(BARS) - 1))]


def _shorten(values: Sequence[float]) -> list[float]:
    if len(values) <= WIDEST:
        return list(values)
    edges = [index * len(values) // WIDEST for index in range(WIDEST + 1)]
    return [max(values[a:b]) for a, b in pairwise(edges)]
