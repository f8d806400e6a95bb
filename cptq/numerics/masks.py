"""Choose the weights that pruning keeps.

The smallest |w| of a matrix are set to zero, exactly floor(sparsity * numel) of them (Han et al.,
arXiv 1506.02626, with one threshold per matrix). Ties are broken by position, row by row, so that
the count is exact and the same weights go every time.

Cost: one selection, O(numel). Limits: magnitudes only; activations and second moments are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def build_magnitude_mask(W_OI: Tensor, sparsity: float) -> Tensor:
    """Return a mask (out, in), True where the weight is kept.

    Args:
        W_OI: weights of any shape.
        sparsity: share of the weights to drop, in [0, 1].

    Raises:
        ValueError: the share is outside [0, 1].
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1]")
    flat = W_OI.reshape(-1).abs()
    drop = int(sparsity * flat.numel() + 1e-9)  # 0.3 * 10 is 3, not 2.9999999999999996
    if drop == 0:
        return torch.ones_like(W_OI, dtype=torch.bool)
    threshold = _find_smallest(flat, drop)
    kept = flat > threshold
    spared = flat.numel() - drop - int(kept.sum())  # ties that stay: mostly none
    if spared:
        ties = flat == threshold
        kept |= ties & (ties.cumsum(0) > int(ties.sum()) - spared)
    return kept.view(W_OI.shape)


def _find_smallest(flat: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value, counted from 1; NumPy takes half of torch's time on a CPU."""
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
        return flat.kthvalue(k).values
    return torch.as_tensor(np.partition(flat.detach().numpy(), k - 1)[k - 1])


def build_two_of_four_mask(score_OI: Tensor) -> Tensor:
    """Return a mask (out, in), True at the two largest |score| of every four neighbouring inputs.

    Raises:
        ValueError: the inputs do not divide by 4.
    """
    if score_OI.shape[1] % 4:
        raise ValueError(f"{score_OI.shape[1]} inputs do not divide into blocks of 4")
    blocks_BK = score_OI.abs().reshape(-1, 4)
    # stable: ties go to the first
    kept_BK = blocks_BK.argsort(dim=1, descending=True, stable=True)[:, :2]
    mask_BK = torch.zeros_like(blocks_BK, dtype=torch.bool).scatter_(1, kept_BK, True)
    return mask_BK.view(score_OI.shape)


def prune_by_magnitude(W_OI: Tensor, sparsity: float) -> Tensor:
    """Return a copy of the weights with the smallest `sparsity` share of them set to zero."""
    return W_OI * build_magnitude_mask(W_OI, sparsity)


def compute_relative_error(dW: Sequence[Tensor], W: Sequence[Tensor]) -> float:
    """Return t^2 = sum |dW|_F^2 / sum |W|_F^2 over matrices; 0 if the weights are all 0."""
    energy = sum(compute_squared_norm(W_OI) for W_OI in W)
    return sum(compute_squared_norm(dW_OI) for dW_OI in dW) / energy if energy else 0.0


def compute_squared_norm(W_OI: Tensor) -> float:
    """Return |W|_F^2."""
    return float(torch.linalg.vector_norm(W_OI)) ** 2
