"""Choose the weights that pruning keeps, from a score of each: the smallest |score| go.

Which score is the caller's business: |w| (Han et al., arXiv 1506.02626) or one of
`cptq.compression.scores`. Which weights are compared with each other is the pattern's:

- unstructured: all of the matrix, of which exactly floor(sparsity * numel) go;
- unstructured by row: those of one output. Row i drops floor((i + 1) n) - floor(i n) with n =
  sparsity * in, so that rows differ by at most one and the whole matrix drops as many as above;
- N:M: M neighbouring inputs of an output, of which N stay (Mishra et al., arXiv 2104.08378).

Ties are broken by position, row by row, so that the count is exact and the same weights go every
time: the first go where a share does, the last in N:M.

Cost: one selection, O(numel); by row a sort of each. Limits: one matrix at a time.
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
    return drop_smallest(W_OI, count_dropped(sparsity, W_OI.numel()))


def drop_smallest(score_OI: Tensor, drop: int) -> Tensor:
    """Return a mask of the same shape, False at the `drop` smallest |score|, the first of ties."""
    flat = score_OI.reshape(-1).abs()
    if drop == 0:
        return torch.ones_like(score_OI, dtype=torch.bool)
    threshold = _find_smallest(flat, drop)
    kept = flat > threshold
    spared = flat.numel() - drop - int(kept.sum())  # ties that stay: mostly none
    if spared:
        ties = flat == threshold
        kept |= ties & (ties.cumsum(0) > int(ties.sum()) - spared)
    return kept.view(score_OI.shape)


def _find_smallest(flat: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value, counted from 1; NumPy takes half of torch's time on a CPU."""
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
        return flat.kthvalue(k).values
    return torch.as_tensor(np.partition(flat.detach().numpy(), k - 1)[k - 1])


def count_dropped(sparsity: float, numel: int) -> int:
    """Return floor(sparsity * numel)."""
    return int(sparsity * numel + 1e-9)  # 0.3 * 10 is 3, not 2.9999999999999996


def build_n_of_m_mask(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Return a mask (out, in), True at the `kept` largest |score| of every `of` neighbours.

    Raises:
        ValueError: the inputs do not divide by `of`.
    """
    if score_OI.shape[1] % of:
        raise ValueError(f"{score_OI.shape[1]} inputs do not divide into blocks of {of}")
    blocks_BK = score_OI.abs().reshape(-1, of)
    # stable: ties go to the first
    kept_BK = blocks_BK.argsort(dim=1, descending=True, stable=True)[:, :kept]
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
