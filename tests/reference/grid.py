"""Symmetric grids by exhaustion: every level tried, every scale that can matter tried.

Levels are the codes themselves, or a table of numbers in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise


def all_codes(bits: int) -> range:
    """Every code of a signed grid."""
    return range(-(2 ** (bits - 1)), 2 ** (bits - 1))


def nearest_codes(
    weights: Sequence[float], scale: float, bits: int, levels: Sequence[int] | None = None
) -> list[int]:
    """For each weight the level whose value is nearest, by trying them all."""
    table = levels or all_codes(bits)
    return [min(table, key=lambda q, w=w: abs(w - q * scale)) for w in weights]


def squared_error(
    weights: Sequence[float], codes: Sequence[int], scale: float, importance: Sequence[float]
) -> float:
    """sum_k h_k (w_k - s q_k)^2."""
    rows = zip(weights, codes, importance, strict=True)
    return sum(h * (w - scale * q) ** 2 for w, q, h in rows)


def least_error(
    weights: Sequence[float],
    bits: int,
    importance: Sequence[float],
    levels: Sequence[int] | None = None,
) -> float:
    """The least squared error of a group over all scales, of either sign.

    The levels change only where a weight lies half way between two of them, s = w / (q + 1/2) on
    even ones. Between two such scales they are constant and the best scale is a quotient of sums,
    so the minimum over the intervals is the minimum.
    """
    table = levels or all_codes(bits)
    best = sum(h * w * w for w, h in zip(weights, importance, strict=True))
    for scale in _one_of_every_interval(weights, table):
        codes = nearest_codes(weights, scale, bits, table)
        norm = sum(h * q * q for q, h in zip(codes, importance, strict=True))
        if norm:
            rows = zip(weights, codes, importance, strict=True)
            fitted = sum(h * w * q for w, q, h in rows) / norm
            best = min(best, squared_error(weights, codes, fitted, importance))
    return best


def _one_of_every_interval(weights: Sequence[float], table: Sequence[int]) -> Iterator[float]:
    halves = [(low + high) / 2 for low, high in pairwise(table)]
    edges = sorted({w / half for w in weights for half in halves if w and half})
    for sign in (1.0, -1.0):
        inside = sorted(abs(edge) for edge in edges if edge * sign > 0)
        for low, high in pairwise([0.0, *inside]):
            yield sign * (low + high) / 2
