"""Sweep over columns, the recursion of optimal brain surgery that GPTQ and SparseGPT share.

For one linear with Hessian H (inputs x inputs) and U upper triangular, H^-1 = U^T U, columns are
visited in order. Column j is projected onto the storable values, p(w_j), and its error is spread
over the columns not yet visited:

    e_j = (w_j - p(w_j)) / U_jj,      w_k <- w_k - e_j U_jk     for k > j

Source: GPTQ (Frantar et al., arXiv 2210.17323, section 3.3); only the projection differs between
GPTQ (a grid) and SparseGPT (a mask, arXiv 2301.00774, section 3). The squared output error that
remains is sum_j |e_j|^2. Here the projection is a callable, so both come from one loop.

Blocks: within a block of `block` columns updates are applied at once, to the columns beyond it in
one matrix product. It is the same sum in another order: `tests/reference/sweep.py` re-inverts the
remaining sub-matrix at every column, and the two agree for any block size.

A mask may be chosen on the way (`numerics.sweep_mask`): blocks are then whole runs of its columns,
so that all earlier errors have moved a run's weights when it is asked.

The weight is kept transposed (inputs first), so that a column is a contiguous row. Only one frame
of indices is used: positions in the visited order. A caller that permutes inputs must permute H,
the weight and the projection alike, and permute the result back.

Cost: out * in^2 multiply-adds and `in` calls of the projection. Limits: H must be positive
definite (see `hessian.factor_damped_inverse`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cptq.numerics.sweep_mask import SweepMask

#: maps (position, current column (out,)) to the column as it will be stored
Project = Callable[[int, Tensor], Tensor]

BLOCK = 128
#: columns whose updates are applied one at a time inside a block
INNER = 32


def sweep_columns(
    W_IO: Tensor,
    U_II: Tensor,
    project: Project,
    *,
    block: int = BLOCK,
    mask: SweepMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Visit every input in order, project it and compensate.

    Args:
        W_IO: weight, inputs first (in, out), whose memory the result takes.
        U_II: upper factor of the inverse Hessian, in the same order of inputs.
        project: returns a stored column, given its position and its current value.
        block: how many columns are finished before the rest is updated.
        mask: chooses, run by run, before their columns are projected.

    Returns:
        The projected weight (in, out), and the remaining error per output (out,), summed over
        inputs: E|x (W - Q)|^2 per output for the damped H.
    """
    loss_O = W_IO.new_zeros(W_IO.shape[1])
    block, inner = _align(block, mask)
    for start in range(0, W_IO.shape[0], block):
        stop = min(start + block, W_IO.shape[0])
        if mask is not None and mask.width > inner:
            mask.choose(start, W_IO[start:stop])
        E_BO = _finish_block(W_IO, U_II, range(start, stop, inner), project, mask)
        W_IO[stop:].addmm_(U_II[start:stop, stop:].T, E_BO, alpha=-1)
        loss_O += E_BO.square().sum(0)
    return W_IO, loss_O


def _align(block: int, mask: SweepMask | None) -> tuple[int, int]:
    """Return the columns of a block and of its parts: whole runs of the mask."""
    if mask is None:
        return block, INNER
    if mask.width > INNER:
        return mask.width, INNER
    inner = INNER // mask.width * mask.width
    return max(inner, block // inner * inner), inner


def _finish_block(
    W_IO: Tensor, U_II: Tensor, parts: range, project: Project, mask: SweepMask | None
) -> Tensor:
    """Project a block, part by part, in place; return the errors (columns, out)."""
    start, stop, inner = parts.start, parts.stop, parts.step
    E_BO = W_IO.new_empty(stop - start, W_IO.shape[1])
    for left in parts:
        right = min(left + inner, stop)
        for j in range(left, right):
            if mask is not None and mask.width <= inner and j % mask.width == 0:
                mask.choose(j, W_IO[j : j + mask.width])
            stored_O = project(j, W_IO[j])
            error_O = torch.sub(W_IO[j], stored_O, out=E_BO[j - start]).div_(U_II[j, j])
            W_IO[j] = stored_O
            W_IO[j + 1 : right].addr_(U_II[j, j + 1 : right], error_O, alpha=-1)
        done = slice(left - start, right - start)
        W_IO[right:stop].addmm_(U_II[left:right, right:stop].T, E_BO[done], alpha=-1)
    return E_BO
