"""Which activations a feed-forward layer needs: zeros, near-zeros, and CETT.

For the inputs a (tokens, features) of the layer's last matrix W (out, features), a weight's part in
the output is n_ti = |a_ti| |W_:i|. Dropping the parts below a threshold e loses

    CETT(e) = mean_t |sum over i with n_ti < e of a_ti W_:i| / |W a_t|

the cumulative error of tail truncation (Luo et al., "Sparsing Law", arXiv 2411.02335, section 3.1).
It grows with e, so `find_threshold` bisects for the e of a given CETT. Lazy neurons (Li et al.,
arXiv 2210.06313): the share of a that is exactly 0 (after ReLU), and here also the share below a
fraction of the token's largest |a|, for activations that are never 0 (SiLU, GELU).

Departures: |W a_t| is without the bias; tokens whose output is 0 count as without error; of a gated
layer a is gate times up, where the lazy-neuron paper has no gate. Cost: of CETT one product with W
per threshold. Limits: tokens are sampled by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: halvings of a range of thresholds
STEPS = 24


def count_small(a_TF: Tensor, share: float) -> tuple[int, int]:
    """Return how many activations are 0, and how many below `share` of the token's largest."""
    sizes_TF = a_TF.abs()
    largest_T1 = sizes_TF.amax(1, keepdim=True)
    return int((sizes_TF == 0).sum()), int((sizes_TF <= share * largest_T1).sum())


class Contributions:
    """The parts that sampled activations have in the output of one layer."""

    def __init__(self, a_TF: Tensor, W_OF: Tensor) -> None:
        self._a_TF, self._W_OF = a_TF.float(), W_OF.float()
        self._size_TF = self._a_TF.abs() * self._W_OF.norm(dim=0)
        self._output_T = (self._a_TF @ self._W_OF.T).norm(dim=1)

    def measure_error(self, threshold: float) -> float:
        """Return CETT at a threshold."""
        lost_T = ((self._a_TF * (self._size_TF < threshold)) @ self._W_OF.T).norm(dim=1)
        ratio_T = torch.where(self._output_T > 0, lost_T / self._output_T, 0.0)
        return float(ratio_T.mean())

    def measure_sparsity(self, threshold: float) -> float:
        """Return the share of activations that a threshold drops."""
        return float((self._size_TF < threshold).float().mean())

    def find_threshold(self, error: float) -> float:
        """Return about the largest threshold whose CETT is at most `error`."""
        low, high = 0.0, float(self._size_TF.max()) * 1.001
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.measure_error(middle) <= error else (low, middle)
        return low
