"""`effective-rank`: how many directions a unit's weights use. Needs no text.

    s = exp(-sum_i p_i log p_i) / min(out, in),      p_i = sigma_i / sum_j sigma_j

the entropy rank of the singular values sigma (Roy & Vetterli, "The effective rank", EUSIPCO 2007),
as a share of its maximum, in (0, 1]: 1 where all directions count equally, small where a few
directions dominate the matrix. The more directions are in use, the less of a change falls into
unimportant ones, so higher is worse if compressed.

Scores come from s by `cptq.sensitivity.slope_metric`. Cost: the eigenvalues of W W^T or W^T W, the
smaller of the two, in float64 (min(out, in)^3). Limits: considers neither data nor loss; singular
values below 1e-8 of the largest are lost in the product and count as 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cptq.numerics.reproducible import one_thread
from cptq.sensitivity.slope_metric import WeightsOnlyMetric

#: squared singular values below this share of the largest are rounding of the product
NEGLIGIBLE = 1e-14


def compute_effective_rank(W_OI: Tensor) -> float:
    """Return the entropy rank over min(out, in), in (0, 1]; 1 for a matrix of zeros."""
    W_OI = W_OI.double()
    gram = W_OI @ W_OI.T if W_OI.shape[0] <= W_OI.shape[1] else W_OI.T @ W_OI
    with one_thread():
        squared_R = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    sigma_R = torch.where(squared_R > NEGLIGIBLE * squared_R[-1], squared_R, 0.0).sqrt()
    total = float(sigma_R.sum())
    if not total:
        return 1.0
    entropy = float(torch.special.entr(sigma_R / total).sum())
    return math.exp(entropy) / len(sigma_R)


class EffectiveRank(WeightsOnlyMetric):
    """Entropy rank of the singular values, as a share."""

    slope_name = "effective rank as a share"

    def score_matrix(self, W_OI: Tensor) -> float:
        """Return the effective rank of a matrix, as a share of its maximum."""
        return compute_effective_rank(W_OI)
