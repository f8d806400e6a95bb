"""Asymmetric integer grids: a scale and an integer zero point per group.

A weight w of a group is stored as a code q in [-2^(b-1), 2^(b-1) - 1] and read back with the
group's zero point z, an integer of the same range:

    q(w) = clamp(round(w / s) + z, -2^(b-1), 2^(b-1) - 1),      w' = (q - z) * s

Source: the grid of GPTQ's released code (Frantar et al., arXiv 2210.17323), its range shrunk step
by step and the best kept; written there with unsigned codes, u = q + 2^(b-1). Departures:

- The range always holds 0, and z is a code itself. So a weight that a mask has set to 0 is read
  back as exactly 0, which a free real offset would not grant, and z is stored in b bits.
- Either end of the range is shrunk on its own: a group with one outlier is clipped on its side.
- The error is squared and weighted by the importance of an input; the best scale is then refitted
  in closed form at fixed codes, s = sum h w (q - z) / sum h (q - z)^2; the scale is rounded to its
  storage type before codes are taken (all as in `numerics.grid`).

Where it helps: groups that lie to one side of 0. It costs b bits per group more than a symmetric
grid; for weights that are even around 0 the signed scales of `numerics.grid` are as good.
Cost: `STEPS^2 + 3 * len(FINER)` passes over the weights, about three times a symmetric grid's.
Limits: the search is a lattice, not exact.
Shapes: W_OI (out, in), scale_OG, zero_OG int8 (out, groups), codes_OI int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.grid import CHUNK, code_range, storable
from cptq.numerics.half_offset import offset_precision

#: shares of the range at which each end is tried, from widest to narrowest
STEPS, WIDEST, NARROWEST = 6, 1.3, 0.35
#: factors of the best scale that are tried then, each with the zero point one lower and higher
FINER = (0.85, 0.92, 1.0, 1.08, 1.18)


def dequantize_asymmetric(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, dtype: torch.dtype
) -> Tensor:
    """(codes - zero) * scale, (out, in); the difference is exact, the product is of `dtype`."""
    out, groups = scale_OG.shape
    steps_OGK = codes_OI.to(dtype).view(out, groups, -1) - zero_OG.to(dtype).unsqueeze(-1)
    return (steps_OGK * scale_OG.to(dtype).unsqueeze(-1)).view(out, -1)


def encode_asymmetric(W_OGK: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int) -> Tensor:
    """Nearest codes (as floats) of grouped weights on given grids; shape of `W_OGK`."""
    low, high = code_range(bits)
    steps_OGK = (W_OGK / scale_OG.unsqueeze(-1)).round_()
    return steps_OGK.add_(zero_OG.to(W_OGK.dtype).unsqueeze(-1)).clamp_(low, high)


def quantize_asymmetric(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    importance_I: Tensor | None = None,
    half_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest on fitted grids.

    Args:
        W_OI: weights (out, in), float32 or float64.
        bits: 2..8.
        group: a divisor of `in`.
        scale_dtype: storage type of the scales.
        importance_I: positive weights of the squared error per input, or None for equal ones.
        half_offset: float16 is to hold scale times zero point too (`numerics.half_offset`).

    Returns:
        codes int8 (out, in), scale (out, in / group) in `scale_dtype`, zero int8 (out, in / group).
    """
    scale_OG, zero_OG = fit_asymmetric(
        W_OI,
        bits,
        group,
        scale_dtype=scale_dtype,
        importance_I=importance_I,
        half_offset=half_offset,
    )
    W_OGK = W_OI.reshape(W_OI.shape[0], -1, group)
    codes_OGK = encode_asymmetric(W_OGK, scale_OG.to(W_OI.dtype), zero_OG, bits)
    return codes_OGK.view(W_OI.shape).to(torch.int8), scale_OG, zero_OG


def fit_asymmetric(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    importance_I: Tensor | None = None,
    half_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scales, positive and in `scale_dtype`, and the int8 zero points alone."""
    rows = max(1, CHUNK // W_OI.shape[1])
    h_GK = None if importance_I is None else importance_I.to(W_OI.dtype).view(-1, group)
    grids = [
        _fit_chunk(W_RI.reshape(W_RI.shape[0], -1, group), bits, h_GK) for W_RI in W_OI.split(rows)
    ]
    scale_OG = torch.cat([scale for scale, _ in grids])
    zero_OG = torch.cat([zero for _, zero in grids]).to(torch.int8)
    precision_OG = offset_precision(zero_OG, bits) if half_offset else None
    return storable(scale_OG, scale_dtype, precision_OG), zero_OG


def _fit_chunk(W_OGK: Tensor, bits: int, h_GK: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best of all pairs of shrunken ends, its scale refitted."""
    below_OG = W_OGK.amin(-1).clamp(max=0)
    above_OG = W_OGK.amax(-1).clamp(min=0)
    scale_OG, zero_OG = _grid(below_OG, above_OG, bits)
    best = scale_OG, zero_OG, _error(W_OGK, scale_OG, zero_OG, bits, h_GK)
    shares = [WIDEST - (WIDEST - NARROWEST) * step / (STEPS - 1) for step in range(STEPS)]
    for left in shares:
        for right in shares:
            trial = _grid(below_OG * left, above_OG * right, bits)
            best = _better(W_OGK, trial, best, bits, h_GK)
    low, high = code_range(bits)
    centre_OG, middle_OG, _ = best
    for step in (-1, 0, 1):
        shifted_OG = (middle_OG + step).clamp(low, high)
        for share in FINER:
            best = _better(W_OGK, (centre_OG * share, shifted_OG), best, bits, h_GK)
    return _refit(W_OGK, *best, bits, h_GK), best[1]


def _better(
    W_OGK: Tensor,
    trial: tuple[Tensor, Tensor],
    best: tuple[Tensor, Tensor, Tensor],
    bits: int,
    h_GK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zero points and errors, each group's trial taken where it lowers the error."""
    scale_OG, zero_OG, least_OG = best
    error_OG = _error(W_OGK, *trial, bits, h_GK)
    smaller_OG = error_OG < least_OG
    return (
        torch.where(smaller_OG, trial[0], scale_OG),
        torch.where(smaller_OG, trial[1], zero_OG),
        torch.where(smaller_OG, error_OG, least_OG),
    )


def _grid(below_OG: Tensor, above_OG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [below, above], which holds 0; scale 1 if empty."""
    low, high = code_range(bits)
    scale_OG = (above_OG - below_OG) / (high - low)
    scale_OG = torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)
    return scale_OG, (low - below_OG / scale_OG).round_().clamp_(low, high)


def _error(
    W_OGK: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, h_GK: Tensor | None
) -> Tensor:
    steps_OGK = encode_asymmetric(W_OGK, scale_OG, zero_OG, bits).sub_(zero_OG.unsqueeze(-1))
    squared_OGK = steps_OGK.mul_(scale_OG.unsqueeze(-1)).sub_(W_OGK).square_()
    return (squared_OGK if h_GK is None else squared_OGK.mul_(h_GK)).sum(-1)


def _refit(
    W_OGK: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    least_OG: Tensor,
    bits: int,
    h_GK: Tensor | None,
) -> Tensor:
    """One closed-form step of the scale at fixed codes, kept where it lowers the error."""
    q_OGK = encode_asymmetric(W_OGK, scale_OG, zero_OG, bits).sub_(zero_OG.unsqueeze(-1))
    hq_OGK = q_OGK if h_GK is None else q_OGK * h_GK
    fitted_OG = (hq_OGK * W_OGK).sum(-1) / (hq_OGK * q_OGK).sum(-1).clamp_min(1e-30)
    fitted_OG = torch.where(fitted_OG > 0, fitted_OG, scale_OG)
    error_OG = _error(W_OGK, fitted_OG, zero_OG, bits, h_GK)
    return torch.where(error_OG < least_OG, fitted_OG, scale_OG)
