"""GPTQ by the book: an explicit inverse, shrunk by elimination, a column at a time.

Optimal brain surgery (Hassibi & Stork 1992): with P the inverse Hessian of the columns that are
still free, fixing column j at q costs (w_j - q)^2 / P_jj and moves the others by
-(w_j - q) P_jk / P_jj; then row and column j are eliminated from P. No Cholesky factor, no blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def damped(H_II: Tensor, damping: float, never: float = 1.0) -> Tensor:
    """H plus `damping` times its mean live diagonal; dead inputs have `never` times that mean."""
    rows = H_II.double().tolist()
    live = [rows[j][j] for j in range(len(rows)) if rows[j][j]]
    mean = sum(live) / len(live) if live else 1.0
    for j in range(len(rows)):
        rows[j][j] = (rows[j][j] or never * mean) + damping * mean
    return torch.tensor(rows, dtype=torch.float64)


def inverse(H_II: Tensor) -> Tensor:
    """Gauss-Jordan elimination on [H | 1]; H is positive definite, so no pivot is zero."""
    size = len(H_II)
    both = np.hstack([H_II.double().numpy(), np.eye(size)])
    for j in range(size):
        both[j] /= both[j, j]
        others = both[:, j].copy()
        others[j] = 0
        both -= np.outer(others, both[j])
    return torch.from_numpy(both[:, size:])


def visiting_order(H_II: Tensor) -> list[int]:
    """Inputs by falling second moment; the earlier one first where two are equal."""
    diagonal = H_II.diagonal().tolist()
    return sorted(range(len(diagonal)), key=lambda j: -diagonal[j])


def prices(H_II: Tensor, damping: float) -> Tensor:
    """What a squared error at each input costs once all later ones have made up for it, (in,).

    An input that never occurs counts a thousandth of the live input that counts least.
    """
    P_II, price_I = inverse(damped(H_II, damping)), torch.empty(len(H_II), dtype=torch.float64)
    for j in visiting_order(H_II):
        price_I[j] = 1 / P_II[j, j]
        P_II = _eliminated(P_II, j)
    live_I = H_II.diagonal() != 0
    price_I[~live_I] = price_I[live_I].min() / 1000
    return price_I


def sweep(
    W_OI: Tensor,
    H_II: Tensor,
    scale_OG: Tensor,
    bits: int,
    damping: float,
    zero_OG: Tensor | None = None,
    mask_OI: Tensor | None = None,
    levels: tuple[int, ...] | None = None,
) -> Tensor:
    """Codes (out, in) on fixed grids, or the nearest of `levels`; masked weights become 0."""
    W_OI, P_II = W_OI.double().clone(), inverse(damped(H_II, damping))
    codes_OI = torch.zeros_like(W_OI)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    group = W_OI.shape[1] // scale_OG.shape[1]
    for j in visiting_order(H_II):
        scale_O = scale_OG[:, j // group].double()
        zero_O = 0.0 * scale_O if zero_OG is None else zero_OG[:, j // group].double()
        if levels is None:
            codes_OI[:, j] = ((W_OI[:, j] / scale_O).round() + zero_O).clamp(low, high)
        else:
            table = torch.tensor(levels, dtype=torch.float64)
            far_OL = (W_OI[:, j, None] - scale_O[:, None] * table).abs()
            codes_OI[:, j] = table[far_OL.argmin(1)]
        if mask_OI is not None:
            codes_OI[:, j] = torch.where(mask_OI[:, j], codes_OI[:, j], zero_O)
        gap_O = W_OI[:, j] - (codes_OI[:, j] - zero_O) * scale_O
        W_OI -= torch.outer(gap_O, P_II[j] / P_II[j, j])
        P_II = _eliminated(P_II, j)
    return codes_OI


def best_scales(W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """The scales with the least output error, row by row; groups without a code keep theirs."""
    fitted_OG, width = scale_OG.double().clone(), W_OI.shape[1] // scale_OG.shape[1]
    for w_I, q_I, s_G in zip(W_OI, codes_OI.double(), fitted_OG, strict=True):
        used = [g for g in range(len(s_G)) if bool(q_I[g * width : (g + 1) * width].any())]
        parts_GI = torch.zeros(len(used), len(q_I), dtype=torch.float64)
        for row, g in enumerate(used):
            parts_GI[row, g * width : (g + 1) * width] = q_I[g * width : (g + 1) * width]
        s_G[used] = inverse(parts_GI @ H_II @ parts_GI.T) @ (parts_GI @ H_II @ w_I)
    return fitted_OG


def _eliminated(P_II: Tensor, j: int) -> Tensor:
    """The inverse Hessian without column j: what is left of P after one step of elimination."""
    P_II = P_II - torch.outer(P_II[:, j], P_II[j]) / P_II[j, j]
    P_II[j] = P_II[:, j] = 0
    return P_II
