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
