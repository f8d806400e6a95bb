"""Sparsity by the book: loops over single weights, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.gptq import inverse


def sparsegpt(
    W_OI: Tensor, H_II: Tensor, sparsity: float, kept_of: tuple[int, int] | None = None
) -> tuple[Tensor, list[list[bool]]]:
    """SparseGPT without rounding: the remaining Hessian is inverted again for every column.

    Before a run of columns the weights with the smallest w^2 / P_jj go, P_jj = inv(H_FF)_00 with F
    the columns from j on; then each column is fixed and the rest compensates. A run is M columns,
    or 128, after which floor(floor(s numel) k / in) weights have gone.
    """
    W_OI = W_OI.double().clone()
    out, inputs = W_OI.shape
    kept = [[True] * inputs for _ in range(out)]
    P = [inverse(H_II[j:, j:]) for j in range(inputs)]
    width, total = (kept_of[1] if kept_of else 128), math.floor(sparsity * out * inputs + 1e-9)
    gone = 0
    for j in range(inputs):
        if j % width == 0:
            run = range(j, min(j + width, inputs))
            price = {
                (i, k): float(W_OI[i, k]) ** 2 / float(P[k][0, 0]) for i in range(out) for k in run
            }
            if kept_of:
                for i in range(out):
                    for k in sorted(run, key=lambda k: (price[i, k], -k))[: width - kept_of[0]]:
                        kept[i][k] = False
            else:
                quota = total * run.stop // inputs - gone
                gone += quota
                for i, k in sorted(price, key=lambda at: (price[at], at[1], at[0]))[:quota]:
                    kept[i][k] = False
        for i in range(out):
            gap = 0.0 if kept[i][j] else float(W_OI[i, j])
            W_OI[i, j:] -= gap * P[j][0] / P[j][0, 0]
            W_OI[i, j] = W_OI[i, j] if kept[i][j] else 0.0
    return W_OI, kept


def pq_index(values: Sequence[float], p: float, q: float) -> float:
    """I = 1 - d^(1/q - 1/p) |w|_p / |w|_q (Diao et al., definition 1)."""
    norm_p = sum(abs(v) ** p for v in values) ** (1 / p)
    norm_q = sum(abs(v) ** q for v in values) ** (1 / q)
    return 1 - len(values) ** (1 / q - 1 / p) * norm_p / norm_q


def gini(values: Sequence[float]) -> float:
    """Half the mean absolute difference of all pairs of magnitudes over their mean."""
    sizes = [abs(v) for v in values]
    pairs = sum(abs(a - b) for a in sizes for b in sizes)
    return pairs / (2 * len(sizes) * sum(sizes))


def outlier_ratio(values: Sequence[float], times: float) -> float:
    """Share of scores above `times` their mean (OWL)."""
    mean = sum(values) / len(values)
    return sum(v > times * mean for v in values) / len(values)


def owl_densities(ratios: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """OWL's code: outlier ratios mapped to a range of twice `spread` about the density."""
    low, high = min(ratios), max(ratios)
    mapped = [(r - low) / (high - low) * 2 * spread for r in ratios]
    mean = sum(mapped) / len(mapped)
    return [m - mean + 1 - sparsity for m in mapped]


def capped_shares(weights: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """Shares c w_l, at most 1, whose mean over sizes is `mean`: c by bisection."""
    low, high = 0.0, 1e12
    for _ in range(400):
        c = (low + high) / 2
        total = sum(min(1.0, c * w) * n for w, n in zip(weights, sizes, strict=True))
        low, high = (c, high) if total < mean * sum(sizes) else (low, c)
    return [min(1.0, low * w) for w in weights]


def cett(a_TF: Tensor, W_OF: Tensor, threshold: float) -> float:
    """Mean over tokens of |sum of dropped contributions| / |output| (Sparsing Law, section 3)."""
    errors = []
    for a_F in a_TF.double():
        contributions = [a_F[f] * W_OF[:, f].double() for f in range(len(a_F))]
        dropped = [c for c in contributions if float(c.norm()) < threshold]
        lost = sum(dropped, torch.zeros(len(W_OF), dtype=torch.float64))
        errors.append(float(lost.norm()) / float(sum(contributions).norm()))
    return sum(errors) / len(errors)
