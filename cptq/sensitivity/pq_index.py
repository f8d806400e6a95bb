"""`pq-index`: how evenly the size of a unit's weights is spread over them. No text is needed.

    I = 1 - d^(1/q - 1/p) |w|_p / |w|_q,      p = 1/2, q = 1, d weights;      s = 1 - I

The PQ Index I (Diao et al., arXiv 2302.05601, definition 1) is 0 where all |w| are equal and goes
to 1 where one weight holds everything: the larger, the more can be left out. s = 1 - I, in (0, 1],
so that higher is worse if compressed. For p = 1/2, q = 1 it is (mean sqrt|w|)^2 / mean |w|.

Scores come from s by `cptq.sensitivity.relative`. Cost: one pass over the weights. Limits: the
index is about pruning; it knows neither data nor loss, and one heavy-tailed matrix scores lower,
although rounding it on an even grid is harder (which t^2 then says).
"""

from __future__ import annotations

from torch import Tensor

from cptq.sensitivity.relative import OfWeights


def evenness(W_OI: Tensor) -> float:
    """1 - PQ Index of the entries with p = 1/2, q = 1; 1 for a matrix of zeros."""
    magnitude_OI = W_OI.abs()
    mean = float(magnitude_OI.double().mean())
    return float(magnitude_OI.sqrt().double().mean()) ** 2 / mean if mean else 1.0


class PqIndex(OfWeights):
    """1 - PQ Index."""

    of = "1 - PQ Index"

    def matrix(self, W_OI: Tensor) -> float:
        """1 - PQ Index of a matrix."""
        return evenness(W_OI)
