"""How unequal magnitudes are: PQ Index, Gini coefficient, share of outliers.

    PQ Index   I = 1 - d^(1/q - 1/p) |w|_p / |w|_q,  p = 1/2, q = 1: 1 - (mean sqrt|w|)^2 / mean |w|
               (Diao et al., arXiv 2302.05601, definition 1)
    SAP bound  at least d (1 + eta)^(-q / (q - p)) (1 - I)^(q p / (q - p)) of d weights must stay,
               where what goes has at most eta times the sum of |w|^p of what stays (theorem 2);
               here (1 + eta)^-2 (1 - I)
    Gini       sum_k (2 k - d - 1) |w|_(k) / (d sum |w|), |w|_(1) <= ... <= |w|_(d)
    outliers   share of scores above M times their mean (OWL, arXiv 2310.05175, equation 1)

All are 0 where magnitudes are equal. Sums run in float64 in parts of fixed size, so that they have
the same bits with any number of threads. Cost: O(d), of Gini a sort. Limits: a matrix as a bag of
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.reproducible import compute_mean, compute_total


def compute_pq_index(W: Tensor) -> float:
    """Return I for p = 1/2, q = 1; 0 for zeros."""
    sizes = W.abs().double()
    mean = float(compute_mean(sizes))
    return 1 - float(compute_mean(sizes.sqrt())) ** 2 / mean if mean else 0.0


def bound_prunable(pq_index: float, eta: float = 0.0) -> float:
    """Return the largest share that may go by the SAP bound."""
    return 1 - (1 + eta) ** -2 * (1 - pq_index)


def compute_gini(W: Tensor) -> float:
    """Return the Gini coefficient of magnitudes; 0 for zeros."""
    sizes = W.reshape(-1).abs().double().sort().values
    total, count = float(compute_total(sizes)), len(sizes)
    ranks = 2 * torch.arange(1, count + 1, dtype=torch.float64, device=W.device) - count - 1
    return float(compute_total(ranks * sizes)) / (count * total) if total else 0.0


def count_outliers(scores: Tensor, times: float) -> int:
    """Return how many scores are above `times` their mean."""
    sizes = scores.abs().double()
    return int((sizes > times * compute_mean(sizes)).sum())
