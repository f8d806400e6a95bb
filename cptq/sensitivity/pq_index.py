"""`pq-index`: how evenly magnitude is spread over a unit's weights. Needs no text.

    I = 1 - d^(1/q - 1/p) |w|_p / |w|_q,      p = 1/2, q = 1, d weights;      s = 1 - I

The PQ Index I (Diao et al., arXiv 2302.05601, definition 1) is 0 where all |w| are equal and
approaches 1 where one weight dominates: the larger, the more can be pruned. s = 1 - I, in (0, 1],
so that higher is worse if compressed. For p = 1/2, q = 1 it is (mean sqrt|w|)^2 / mean |w|.

Scores come from s by `cptq.sensitivity.slope_metric`. Cost: one pass over the weights. Limits: the
index is about pruning; it considers neither data nor loss, and a heavy-tailed matrix scores lower
although rounding it on a uniform grid is harder (which the factor t^2 covers).
"""

from __future__ import annotations

from torch import Tensor

from cptq.numerics.inequality import compute_pq_index
from cptq.sensitivity.slope_metric import WeightsOnlyMetric


def compute_evenness(W_OI: Tensor) -> float:
    """Return 1 - PQ Index of the entries with p = 1/2, q = 1; 1 for a matrix of zeros."""
    return 1 - compute_pq_index(W_OI)


class PqIndex(WeightsOnlyMetric):
    """1 - PQ Index."""

    slope_name = "1 - PQ Index"

    def score_matrix(self, W_OI: Tensor) -> float:
        """Return 1 - PQ Index of a matrix."""
        return compute_evenness(W_OI)
