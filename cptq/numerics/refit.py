"""Best scales for given codes, all groups of a row at once, in the metric of the Hessian.

With codes q fixed, a row's weight is sum_g s_g q_g (q_g: its codes in group g, zero elsewhere), and
the squared output error is quadratic in the scales. For each row

    A s = b,     A_gh = q_g^T H q_h,     b_g = q_g^T H w

Source: normal equations of least squares; used after GPTQ by several codes (OPTQ follow-ups fit
scales again with frozen integers). Solved for the change from the scales in hand with a small
ridge, so that a group without any non-zero code keeps its scale. A row is changed only where its
error, with scales as stored, becomes smaller.

A is symmetric: of each q_g^T H only the groups from g on are computed. Cost: out * in^2 / 2
multiply-adds, twice as many for b, and out solves of (groups x groups). Rows are handled in chunks
that bound the memory. Shapes: W_OI, H_II, codes_OI int8, scale_OG.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from cptq.numerics.grid import dequantize, round_scales
from cptq.numerics.scale_grids import ScaleType

RIDGE = 1e-6
#: groups whose products with H are held at once, for some rows and all inputs
GROUPS = 4
#: floats of the largest intermediate
CHUNK = 1 << 22


def refit_scales(
    W_OI: Tensor,
    H_II: Tensor,
    codes_OI: Tensor,
    scale_OG: Tensor,
    precision_OG: Tensor | None = None,
    *,
    scale_dtype: ScaleType | None = None,
) -> Tensor:
    """Scales in their storage type with an output error no larger in any row.

    Args:
        W_OI: the weight to come near to (out, in); some rows at a time take the type of H.
        H_II: second moment of the inputs.
        codes_OI: int8 codes, not changed.
        scale_OG: present scales (out, groups), in storage type.
        precision_OG: significant bits that each may have, as in `numerics.grid.round_scales`.
        scale_dtype: how they are stored; without, in their type.
    """
    stored = scale_dtype or scale_OG.dtype
    features, groups = W_OI.shape[1], scale_OG.shape[1]
    rows = max(1, CHUNK // max(GROUPS * features, groups**2))
    parts = zip(W_OI.split(rows), codes_OI.split(rows), scale_OG.split(rows), strict=True)
    limits = repeat(None) if precision_OG is None else iter(precision_OG.split(rows))
    return torch.cat([_refit_rows(*part, H_II, next(limits), stored) for part in parts])


def _refit_rows(
    W_OI: Tensor,
    codes_OI: Tensor,
    scale_OG: Tensor,
    H_II: Tensor,
    precision_OG: Tensor | None,
    stored: ScaleType,
) -> Tensor:
    W_OI = W_OI.to(H_II.dtype)
    present_OG = scale_OG.to(W_OI.dtype)
    A_OGH, b_OG = _build_equations(W_OI, H_II, codes_OI, present_OG)
    fitted_OG = round_scales(present_OG + _solve(A_OGH, b_OG), stored, precision_OG)
    moved_OG = fitted_OG.to(W_OI.dtype) - present_OG
    # error after less error before, from the equations: two products with H less than from weights
    change_O = (moved_OG * (torch.einsum("ogh,oh->og", A_OGH, moved_OG) - 2 * b_OG)).sum(1)
    return torch.where((change_O < 0).unsqueeze(1), fitted_OG, scale_OG)


def _build_equations(
    W_OI: Tensor, H_II: Tensor, codes_OI: Tensor, scale_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """Return A (out, groups, groups) and q^T H (w - s q) (out, groups)."""
    out, groups = scale_OG.shape
    q_OGK = codes_OI.to(W_OI.dtype).view(out, groups, -1)
    size = q_OGK.shape[2]
    H_GKHL = H_II.view(groups, size, groups, size)
    A_OGH = W_OI.new_empty(out, groups, groups)
    for start in range(0, groups, GROUPS):
        end = min(start + GROUPS, groups)
        Hq_OGKH = torch.einsum("gkhl,ohl->ogkh", H_GKHL[start:, :, start:end], q_OGK[:, start:end])
        found_OGH = torch.einsum("ogk,ogkh->ogh", q_OGK[:, start:], Hq_OGKH)
        A_OGH[:, start:, start:end] = found_OGH
        A_OGH[:, start:end, start:] = found_OGH.transpose(1, 2)
    gap_OI = W_OI - dequantize(codes_OI, scale_OG, dtype=W_OI.dtype)
    return A_OGH, (q_OGK * (gap_OI @ H_II).view_as(q_OGK)).sum(-1)


def _solve(A_OGH: Tensor, b_OG: Tensor) -> Tensor:
    """Return what to add to the scales (out, groups), row by row."""
    groups = b_OG.shape[1]
    ridge_O = RIDGE * A_OGH.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye_GG = torch.eye(groups, dtype=A_OGH.dtype, device=A_OGH.device)
    change_OG: Tensor = torch.linalg.solve(A_OGH + ridge_O.view(-1, 1, 1) * eye_GG, b_OG)
    return change_OG
