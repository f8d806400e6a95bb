"""The column sweep by the book: re-invert the remaining Hessian at every column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def naive_sweep(
    W_OI: Tensor, H_II: Tensor, project: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery, one column at a time (Hassibi & Stork 1992).

    With F the columns not yet visited and P = inv(H_FF), fixing column j at p(w_j) costs
    (w_j - p)^2 / P_00 and moves the others by -(w_j - p) P_0k / P_00.
    """
    W_OI = W_OI.clone()
    loss_O = W_OI.new_zeros(W_OI.shape[0])
    for j in range(W_OI.shape[1]):
        P_FF = torch.linalg.inv(H_II[j:, j:])
        stored_O = project(j, W_OI[:, j].clone())
        gap_O = W_OI[:, j] - stored_O
        loss_O += gap_O**2 / P_FF[0, 0]
        W_OI[:, j + 1 :] -= gap_O[:, None] * (P_FF[0, 1:] / P_FF[0, 0])[None, :]
        W_OI[:, j] = stored_O
    return W_OI, loss_O
