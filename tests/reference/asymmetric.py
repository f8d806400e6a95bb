"""Asymmetric grids by exhaustion, and matrices of packed tensors read value by value."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.grid import all_codes


def nearest_codes(weights: Sequence[float], scale: float, zero: int, bits: int) -> list[int]:
    """For each weight the code whose value (q - z) * s is nearest, by trying them all."""
    return [min(all_codes(bits), key=lambda q, w=w: abs(w - (q - zero) * scale)) for w in weights]


def squared_error(
    weights: Sequence[float],
    codes: Sequence[int],
    scale: float,
    zero: int,
    importance: Sequence[float],
) -> float:
    """sum_k h_k (w_k - s (q_k - z))^2."""
    rows = zip(weights, codes, importance, strict=True)
    return sum(h * (w - scale * (q - zero)) ** 2 for w, q, h in rows)


def least_error(weights: Sequence[float], bits: int, importance: Sequence[float]) -> float:
    """The least squared error over every zero point and every scale that can matter.

    For a given zero point the codes change only where a weight lies half way between two grid
    points, s = w / (k + 1/2); between two such scales the best one is a quotient of sums.
    """
    best = sum(h * w * w for w, h in zip(weights, importance, strict=True))
    steps = [k + 0.5 for k in range(-(2**bits), 2**bits)]
    edges = sorted({w / step for w in weights for step in steps if w and w / step > 0})
    middles = [(low + high) / 2 for low, high in zip([0.0, *edges], edges, strict=False)]
    for zero in all_codes(bits):
        for scale in middles:
            codes = nearest_codes(weights, scale, zero, bits)
            norm = sum(h * (q - zero) ** 2 for q, h in zip(codes, importance, strict=True))
            if norm:
                rows = zip(weights, codes, importance, strict=True)
                fitted = sum(h * w * (q - zero) for w, q, h in rows) / norm
                best = min(best, squared_error(weights, codes, fitted, zero, importance))
    return best


def bits_of(words: Sequence[int], start: int, count: int) -> int:
    """`count` bits of a stream of signed 32-bit words, as an unsigned number."""
    bit = [(words[i // 32] >> (i % 32)) & 1 for i in range(start, start + count)]
    return sum(value << place for place, value in enumerate(bit))
