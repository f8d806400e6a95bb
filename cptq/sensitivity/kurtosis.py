"""`kurtosis`: how heavy the tails of a unit's weights are. No text is needed.

    s = mean (w - m)^4 / (mean (w - m)^2)^2,      m = mean w

Pearson's kurtosis over the entries of a matrix: 1.8 for even, 3 for normal weights, more where a
few are far out. An even grid must stretch to reach those, so higher is worse if compressed; it is
what rotations lower before quantizing (QuaRot, arXiv 2404.00456) and what is regularised for robust
quantization (Shkolnik et al., arXiv 2002.07686, section 3).

Scores come from s by `cptq.sensitivity.relative`. Cost: one pass over the weights, in float64.
Limits: neither data nor loss; a scale per group of inputs takes much of the tails away, and t^2,
which the score has as well, counts what is left of them.
"""

from __future__ import annotations

from torch import Tensor

from cptq.sensitivity.relative import OfWeights


def kurtosis(W_OI: Tensor) -> float:
    """Pearson's kurtosis of the entries, at least 1; 1 for a constant matrix."""
    centred_OI = W_OI.double() - W_OI.double().mean()
    squared_OI = centred_OI.square_()
    variance = float(squared_OI.mean())
    return float(squared_OI.square_().mean()) / variance**2 if variance else 1.0


class Kurtosis(OfWeights):
    """Fourth standardised moment."""

    of = "kurtosis"

    def matrix(self, W_OI: Tensor) -> float:
        """Kurtosis of a matrix."""
        return kurtosis(W_OI)
