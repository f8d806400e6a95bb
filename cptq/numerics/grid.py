"""Symmetric integer grids: one signed scale per group, fitted by weighted squared error.

A weight w of a group is stored as a code q in [-2^(b-1), 2^(b-1) - 1] and read back as q * s:

    q(w) = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1),      s = argmin_s sum_k h_k (w_k - s q_k)^2

Source: the MSE clip search of GPTQ's released code (Frantar et al., arXiv 2210.17323), which
shrinks the range step by step and keeps the best. Departures:

- The scale may be negative. The integer range has one more negative than positive code; which side
  needs it differs from group to group, and at 2 and 3 bits that one code is worth a lot. A loader
  only ever multiplies, so nothing changes for it (llama.cpp's Q4_0 does the same).
- The error is squared (GPTQ: power 2.4) and weighted by h, the importance of an input. After
  the search the best scale is refitted in closed form, s = sum h w q / sum h q^2.
- The scale is rounded to its storage type before the codes are taken, so that the numbers on disk
  are the numbers that were measured.
- The search is coarse first and fine around the best: on smollm2-135m-dithered the error is within
  0.2% of 24 equal steps at 2 to 4 bits (1 to 4% at 5 to 8), in less than half the time.

Cost: `2 * STEPS + len(FINER)` passes over the weights, a row block at a time. Limits: no zero
point; a group of zeros gets scale 1 (stock loaders divide by it nowhere, but some refuse a 0).
Shapes: W_OI (out, in), scale_OG (out, groups), codes_OI int8; a group is a run of `in / G` inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.half_offset import rounded_to

#: shares of the full range that the clip search tries first, from widest to narrowest
STEPS, WIDEST, NARROWEST = 6, 1.15, 0.45
#: what it tries around the best of them, in strides between two shares
FINER = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
#: weights handled at once by the search, which needs a few copies of them
CHUNK = 1 << 20


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and largest code of a signed grid of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def encode(W_OGK: Tensor, scale_OG: Tensor, bits: int) -> Tensor:
    """Nearest codes (as floats) of grouped weights on given scales; shape of `W_OGK`."""
    low, high = code_range(bits)
    return (W_OGK / scale_OG.unsqueeze(-1)).round_().clamp_(low, high)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, (out, in), multiplied in `dtype`."""
    out, groups = scale_OG.shape
    codes_OGK = codes_OI.to(dtype).view(out, groups, -1)
    return (codes_OGK * scale_OG.to(dtype).unsqueeze(-1)).view(out, -1)


def quantize_nearest(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    importance_I: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round to nearest on fitted scales.

    Args:
        W_OI: weights (out, in), float32 or float64.
        bits: 2..8.
        group: a divisor of `in`.
        clip: search the clipping range; otherwise the largest magnitude fixes the scale.
        scale_dtype: storage type of the scales.
        importance_I: positive weights of the squared error per input, or None for equal ones.

    Returns:
        codes int8 (out, in) and scale (out, in / group) in `scale_dtype`.
    """
    scale_OG = fit_scales(
        W_OI, bits, group, clip=clip, scale_dtype=scale_dtype, importance_I=importance_I
    )
    codes_OGK = encode(_grouped(W_OI, group), scale_OG.to(W_OI.dtype), bits)
    return codes_OGK.view(W_OI.shape).to(torch.int8), scale_OG


def fit_scales(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    importance_I: Tensor | None = None,
) -> Tensor:
    """The scales (out, in / group) alone, in `scale_dtype`, never 0; arguments as above."""
    rows = max(1, CHUNK // W_OI.shape[1])
    h_GK = None if importance_I is None else importance_I.to(W_OI.dtype).view(-1, group)
    parts = [_fit_chunk(_grouped(W_RI, group), bits, clip, h_GK) for W_RI in W_OI.split(rows)]
    return storable(torch.cat(parts), scale_dtype)


def storable(scale_OG: Tensor, dtype: torch.dtype, precision_OG: Tensor | None = None) -> Tensor:
    """Scales rounded to their storage type; what rounds to 0 or overflows is pulled back inside.

    `precision_OG`: the significant bits that each may have (`numerics.half_offset`), if fewer.
    """
    if precision_OG is not None:
        scale_OG = rounded_to(scale_OG, precision_OG)
    limits = torch.finfo(dtype)
    sign = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
    tiny = 2.0**-24 if dtype is torch.float16 else limits.tiny
    return (sign * scale_OG.abs().clamp(tiny, limits.max)).to(dtype)


def _grouped(W_OI: Tensor, group: int) -> Tensor:
    return W_OI.reshape(W_OI.shape[0], -1, group)


def _fit_chunk(W_OGK: Tensor, bits: int, clip: bool, h_GK: Tensor | None) -> Tensor:
    """Best of the shrunken ranges with either sign, refitted in closed form."""
    full_OG = _full_range_scale(W_OGK, bits)
    if not clip:
        return full_OG
    widest_OG = W_OGK.abs().amax(-1) / (2 ** (bits - 1))
    widest_OG = torch.where(widest_OG == 0, torch.ones_like(widest_OG), widest_OG)
    best = full_OG, _error(W_OGK, full_OG, bits, h_GK)
    for step in range(STEPS):
        share = WIDEST - (WIDEST - NARROWEST) * step / (STEPS - 1)
        for signed_share in (share, -share):
            best = _better(W_OGK, widest_OG * signed_share, best, bits, h_GK)
    centre_OG = best[0]
    stride_OG = widest_OG * ((WIDEST - NARROWEST) / (STEPS - 1))
    for part in FINER:
        best = _better(W_OGK, centre_OG + part * stride_OG, best, bits, h_GK)
    return _refit(W_OGK, *best, bits, h_GK)


def _better(
    W_OGK: Tensor,
    trial_OG: Tensor,
    best: tuple[Tensor, Tensor],
    bits: int,
    h_GK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scales and their errors, each group's trial taken where it lowers the error."""
    scale_OG, least_OG = best
    error_OG = _error(W_OGK, trial_OG, bits, h_GK)
    smaller_OG = error_OG < least_OG
    return torch.where(smaller_OG, trial_OG, scale_OG), torch.where(smaller_OG, error_OG, least_OG)


def _full_range_scale(W_OGK: Tensor, bits: int) -> Tensor:
    """The plain symmetric scale, max|w| / (2^(b-1) - 1); 1 for a group of zeros."""
    scale_OG = W_OGK.abs().amax(-1) / (2 ** (bits - 1) - 1)
    return torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)


def _error(W_OGK: Tensor, scale_OG: Tensor, bits: int, h_GK: Tensor | None) -> Tensor:
    difference_OGK = encode(W_OGK, scale_OG, bits).mul_(scale_OG.unsqueeze(-1)).sub_(W_OGK)
    squared_OGK = difference_OGK.square_()
    return (squared_OGK if h_GK is None else squared_OGK.mul_(h_GK)).sum(-1)


def _refit(
    W_OGK: Tensor, scale_OG: Tensor, least_OG: Tensor, bits: int, h_GK: Tensor | None
) -> Tensor:
    """One closed-form step of the scale at fixed codes, kept where it lowers the error."""
    q_OGK = encode(W_OGK, scale_OG, bits)
    hq_OGK = q_OGK if h_GK is None else q_OGK * h_GK
    norm_OG = (hq_OGK * q_OGK).sum(-1)
    fitted_OG = (hq_OGK * W_OGK).sum(-1) / norm_OG.clamp_min(1e-30)
    usable_OG = (norm_OG > 0) & (fitted_OG != 0)
    fitted_OG = torch.where(usable_OG, fitted_OG, scale_OG)
    return torch.where(_error(W_OGK, fitted_OG, bits, h_GK) < least_OG, fitted_OG, scale_OG)
