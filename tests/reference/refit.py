"""Best scales for fixed codes, one row at a time, as an ordinary least-squares problem."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_refit(W_OI: Tensor, X_TI: Tensor, codes_OI: Tensor, groups: int) -> Tensor:
    """argmin_s |X w - X sum_g s_g q_g|^2 by lstsq on the activations themselves."""
    rows = []
    for w_I, q_I in zip(W_OI, codes_OI.to(W_OI.dtype), strict=True):
        columns = []
        for g in range(groups):
            part_I = torch.zeros_like(q_I)
            width = len(q_I) // groups
            part_I[g * width : (g + 1) * width] = q_I[g * width : (g + 1) * width]
            columns.append(X_TI @ part_I)
        solution = torch.linalg.lstsq(torch.stack(columns, 1), (X_TI @ w_I)[:, None]).solution
        rows.append(solution[:, 0])
    return torch.stack(rows)


def measure_output_error(W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Squared output error per row (out,), E |x (w - s q)|^2, float64."""
    size = W_OI.shape[1] // scale_OG.shape[1]
    gap_OI = W_OI.double() - codes_OI.double() * scale_OG.double().repeat_interleave(size, dim=1)
    return torch.stack([gap_I @ H_II.double() @ gap_I for gap_I in gap_OI])
