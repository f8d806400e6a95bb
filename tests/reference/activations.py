"""Activation sparsity by the book: one token and one input after the other, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

FUNCTIONS: Mapping[str, Callable[[float], float]] = {
    "relu": lambda v: max(v, 0.0),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_new": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """The sum of products."""
    return sum(v * w for v, w in zip(a, b, strict=True))


def limits(kind: str, x: Sequence[float], threshold: Sequence[float]) -> list[float]:
    """The size up to which each input of a token is dropped; below 0: none."""
    if kind in ("value", "low-rank"):
        return [threshold[0]] * len(x)
    if kind == "channel":
        return list(threshold)
    if kind == "spread":
        mean = sum(map(abs, x)) / len(x)
        variance = sum((abs(v) - mean) ** 2 for v in x) / len(x)
        return [mean + threshold[0] * math.sqrt(variance)] * len(x)
    return [-1.0] * len(x)


def multiply(
    label: str, tensors: Mapping[str, Tensor], x_TI: Tensor, W_OI: Tensor, bias_O: Tensor
) -> list[list[float]]:
    """What a linear with a rule computes of each token."""
    kind, _, argument = label.partition("-")
    kind = "low-rank" if kind == "low" else kind
    threshold = tensors["activation_threshold"].double().tolist() if tensors else []
    W, bias, found = W_OI.double().tolist(), bias_O.double().tolist(), []
    for x in x_TI.double().tolist():
        end = limits(kind, x, threshold)
        kept = [v if abs(v) > limit else 0.0 for v, limit in zip(x, end, strict=True)]
        y = [
            sum(w * v for w, v in zip(row, kept, strict=True)) + b
            for row, b in zip(W, bias, strict=False)
        ]
        if kind == "low-rank":
            rest = [v - k for v, k in zip(x, kept, strict=True)]
            A = tensors["activation_right"].double().tolist()
            B = tensors["activation_left"].double().tolist()
            inner = [sum(a * v for a, v in zip(row, rest, strict=True)) for row in A]
            y = [
                v + sum(b * u for b, u in zip(row, inner, strict=True))
                for v, row in zip(y, B, strict=False)
            ]
        if kind == "gate":
            y = [
                v if abs(FUNCTIONS[argument](v)) > t else 0.0
                for v, t in zip(y, threshold, strict=False)
            ]
        found.append(y)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The largest of the smallest share of values."""
    count = round(share * len(values))
    return sorted(values)[count - 1] if count else 0.0


def split(
    numel: Sequence[int], error: Callable[[Sequence[float]], float], share: float, step: float
) -> list[float]:
    """TEAL's greedy split: every step of every linear is measured before one is taken."""
    shares, budget = [0.0] * len(numel), share * sum(numel)
    while True:
        left = budget - dot(shares, numel)
        if left <= 1e-9 * budget:
            return shares
        best = (math.inf, 0, 0.0)
        for place, n in enumerate(numel):
            by = min(step, 0.95 - shares[place])
            if by > 1e-9:
                tried = [p + by * (k == place) for k, p in enumerate(shares)]
                best = min(best, ((error(tried) - error(shares)) / (by * n), place, by))
        shares[best[1]] += min(best[2], left / numel[best[1]])
