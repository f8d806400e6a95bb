"""`kurtosis`: how heavy the tails of a unit's weights are. Needs no text.

    s = mean (w - m)^4 / (mean (w - m)^2)^2,      m = mean w

Pearson's kurtosis over the entries of a matrix: 1.8 for uniform, 3 for normal weights, more with
outliers. A uniform grid must stretch to cover those, so higher is worse if compressed; rotations
before quantization lower it (QuaRot, arXiv 2404.00456), and robust quantization regularizes it
(Shkolnik et al., arXiv 2002.07686, section 3).

Scores come from s by `cptq.sensitivity.slope_metric`. Cost: one pass over the weights, in float64.
Limits: considers neither data nor loss; a scale per group of inputs removes much of the tails, and
t^2, a factor of the score, counts the rest.
"""

from __future__ import annotations

from torch import Tensor

from cptq.numerics.reproducible import compute_mean
from cptq.sensitivity.slope_metric import WeightsOnlyMetric


def compute_kurtosis(W_OI: Tensor) -> float:
    """Return Pearson's kurtosis of the entries, at least 1; 1 for a constant matrix."""
    centred_OI = W_OI.double() - compute_mean(W_OI.double())
    squared_OI = centred_OI.square_()
    variance = float(compute_mean(squared_OI))
    return float(compute_mean(squared_OI.square_())) / variance**2 if variance else 1.0


class Kurtosis(WeightsOnlyMetric):
    """Fourth standardized moment."""

    slope_name = "kurtosis"

    def score_matrix(self, W_OI: Tensor) -> float:
        """Return the kurtosis of a matrix."""
        return compute_kurtosis(W_OI)
