"""Integer grids, symmetric and asymmetric: fit them, round to them, multiply codes out.

A weight w of a group is stored as a code q in [-2^(b-1), 2^(b-1) - 1] and read back with the
group's scale s and, on an asymmetric grid, its zero point z, an integer of the same range:

    q(w) = clamp(round(w / s) + z, -2^(b-1), 2^(b-1) - 1),      w' = (q - z) * s
    s, z = argmin sum_k h_k (w_k - w'_k)^2,                     symmetric: z = 0

Source: the MSE clip search of GPTQ's released code (Frantar et al., arXiv 2210.17323), which
shrinks the range step by step and keeps the best; written there with unsigned codes, u = q +
2^(b-1). Departures:

- The error is squared (GPTQ: power 2.4) and weighted by h, the importance of an input. After the
  search the best scale is refitted in closed form at fixed codes, s = sum h w (q - z) / sum h (q -
  z)^2.
- The scale is rounded to its storage type before the codes are taken, so that the numbers on disk
  are the numbers that were measured.
- The search is coarse first and fine around the best: on smollm2-135m-dithered the error of a
  symmetric grid is within 0.2% of 24 equal steps at 2 to 4 bits (1 to 4% at 5 to 8), in less than
  half the time.
- A symmetric scale may be negative. The integer range has one more negative than positive code;
  which side needs it differs from group to group, and at 2 and 3 bits that one code matters a lot.
  A loader only ever multiplies, so nothing changes for it (llama.cpp's Q4_0 does the same).
- An asymmetric range always holds 0, and z is a code itself. So a weight that a mask has set to 0
  is read back as exactly 0, which a free real offset would not grant, and z is stored in b bits.
- Either end of an asymmetric range is shrunk on its own: a group with one outlier is clipped on
  the outlier's side.

A symmetric grid may have levels that are not evenly spaced (`numerics.levels`): integers in place
of q, with scales from the same search.

When to use which: an asymmetric grid helps groups that lie to one side of 0 and costs b bits more
per group; for weights distributed evenly around 0 signed symmetric scales are as good.
Cost: 2 * 6 + 6 passes over the weights for a symmetric grid, 6^2 + 3 * 5 for an asymmetric one,
about three times as long; a block of rows at a time.
Limits: the search is a lattice, not exact. A group of zeros gets scale 1 (stock loaders divide by
the scale nowhere, but some refuse a 0); of scales with a common factor, and with uneven levels, of
which none is 0, the smallest.
Shapes: W_OI (out, in), scale_OG and zero_OG (out, groups), codes_OI int8; a group is a run of
`in / G` inputs.

Scales whose product with the zero point float16 holds (`float16_offset`)
-------------------------------------------------------------------------
ggml's Q4_1 and Q5_1 store an asymmetric weight as d * u + m with d and m in float16, so that

    d = s,      m = -s * n,      n = z + 2^(b-1) in [0, 2^b - 1]

float16 has 11 significant bits. Let n be an odd number of k bits times a power of two: if s has at
most 11 - k of them (all 11 where that odd number is 1, as a power of two moves no bit), s * n fits.
So scales are rounded to that many bits, by their own zero point, before codes are taken, and an
export rounds nothing.

Range: a scale is a multiple of 2^-24, float16's smallest number, and at most 2^11 (2^11 * 31 is
still below 65504); the same holds in bfloat16, whose 8 bits only round further.
Cost, as squared error of weights rounded to nearest in groups of 32 (192 rows of each of 21 linears
of smollm2-135m-dithered): 0.04% at 4 bits and 0.5% at 5, where a symmetric grid has 13% and 20%
more. Limits: at 8 bits a scale would keep 3 bits, and ggml has no such block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cptq.numerics.chunks import choose_rows
from cptq.numerics.levels import Spacing
from cptq.numerics.scale_grids import ScaleType
from cptq.types import CompressedLayer

#: scale (out, groups), and the zero point of the same shape where the grid is asymmetric
Grid = tuple[Tensor, Tensor | None]

#: how many shares of the full range are tried first, and the widest and narrowest of them
STEPS = 6
SYMMETRIC_SHARES = (1.15, 0.45)
ASYMMETRIC_SHARES = (1.3, 0.35)
#: tried around the best symmetric scale, in strides between two shares
SYMMETRIC_FINER = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
#: factors of the best asymmetric scale, each tried with the zero point one lower and higher
ASYMMETRIC_FINER = (0.85, 0.92, 1.0, 1.08, 1.18)
#: weights handled at once by the search on a CPU, which needs a few copies of them: as many as a
#: core's cache holds (1536 x 576, 4 bits: 0.03 s, with 2^20 at once 0.055 s)
CHUNK = 1 << 17

#: significant bits of a float16, its smallest number as a power of two, and the largest scale
SIGNIFICANT, SMALLEST, LARGEST = 11, -24, 2.0**11
#: most bits of a code for which these bounds keep scale times zero point exact in float16
MOST_BITS = 5


def get_code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest code of a signed grid of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def encode(
    W_OGK: Tensor,
    spacing: Spacing,
    scale_OG: Tensor,
    zero_OG: Tensor | None = None,
) -> Tensor:
    """Return the nearest codes (as floats) of grouped weights on given grids; shape of `W_OGK`.

    Of unevenly spaced levels these are the levels.
    """
    steps_OGK = W_OGK / scale_OG.unsqueeze(-1)
    if zero_OG is None:
        return spacing.round(steps_OGK)
    low, high = get_code_range(spacing.bits)
    steps_OGK.round_().add_(zero_OG.to(W_OGK.dtype).unsqueeze(-1))
    return steps_OGK.clamp_(low, high)


def dequantize(
    codes_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None = None,
    mask_OI: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight (out, in) of codes: (codes - zero) * scale, and 0 outside the mask.

    The difference is exact; the product is computed in `dtype`, in one buffer of that type.
    """
    out, groups = scale_OG.shape
    steps_OGK = codes_OI.to(dtype, copy=True).view(out, groups, -1)
    if zero_OG is not None:
        steps_OGK.sub_(zero_OG.to(dtype).unsqueeze(-1))
    W_OI = steps_OGK.mul_(scale_OG.to(dtype).unsqueeze(-1)).view(out, -1)
    return W_OI if mask_OI is None else W_OI.masked_fill_(~mask_OI, 0.0)


def dequantize_layer(layer: CompressedLayer, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) of a compressed layer in `dtype`.

    An expert's is multiplied out in the type of its scales, as stock transformers does before it
    stacks the experts.
    """
    product = layer.scale.dtype if layer.spec.expert else dtype
    return dequantize(layer.codes, layer.scale, layer.zero, layer.mask, dtype=product).to(dtype)


def quantize_nearest(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: ScaleType = torch.float16,
    importance_I: Tensor | None = None,
    float16_offset: bool = False,
    levels: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to nearest on fitted grids.

    Args:
        W_OI: weights (out, in), float32 or float64.
        bits: 2..8.
        group: a divisor of `in`.
        symmetric: fit signed scales alone; otherwise positive scales and zero points.
        clip: search the clipping range; otherwise the plain range fixes the grid.
        scale_dtype: storage type of the scales.
        importance_I: positive weights of the squared error per input, or None for equal ones.
        float16_offset: round asymmetric scales so that float16 holds scale times zero point.
        levels: a table of unevenly spaced levels (`numerics.levels`) of a symmetric grid.

    Returns:
        codes int8 (out, in), or levels where these are uneven, scale (out, in / group) in
        `scale_dtype`, and the zero point, int8 of the scale's shape, or None where the grid is
        symmetric.
    """
    scale_OG, zero_OG = fit_grid(
        W_OI,
        bits,
        group,
        symmetric=symmetric,
        clip=clip,
        scale_dtype=scale_dtype,
        importance_I=importance_I,
        float16_offset=float16_offset,
        levels=levels,
    )
    spacing = Spacing(bits, levels)
    codes_OGK = encode(_split_groups(W_OI, group), spacing, scale_OG.to(W_OI.dtype), zero_OG)
    return codes_OGK.view(W_OI.shape).to(torch.int8), scale_OG, zero_OG


def fit_grid(
    W_OI: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: ScaleType = torch.float16,
    importance_I: Tensor | None = None,
    float16_offset: bool = False,
    levels: str = "",
) -> Grid:
    """Fit scales, never 0 and in `scale_dtype`, and int8 zero points; see `quantize_nearest`."""
    rows, spacing = choose_rows(W_OI, CHUNK), Spacing(bits, levels)
    h_GK = None if importance_I is None else importance_I.to(W_OI.dtype).view(-1, group)
    grids = [
        _fit_chunk(_split_groups(W_RI, group), spacing, symmetric, clip, h_GK)
        for W_RI in W_OI.split(rows)
    ]
    scale_OG = torch.cat([scale for scale, _ in grids])
    zeros = [zero for _, zero in grids if zero is not None]
    if not zeros:
        if levels or not isinstance(scale_dtype, torch.dtype):
            scale_OG = torch.where(_find_empty_groups(W_OI, group), 0.0, scale_OG)
        return round_scales(scale_OG, scale_dtype), None
    zero_OG = torch.cat(zeros).to(torch.int8)
    precision_OG = count_scale_bits(zero_OG, bits) if float16_offset else None
    return round_scales(scale_OG, scale_dtype, precision_OG), zero_OG


def round_scales(scale_OG: Tensor, dtype: ScaleType, precision_OG: Tensor | None = None) -> Tensor:
    """Round scales to their storage type; what would become 0 or overflow is pulled back inside.

    Narrower ways to store them give float32 (`numerics.scale_grids`), or 16 bits in the case of
    `numerics.super_scales`.

    `precision_OG`: the significant bits that each may have (`count_scale_bits`), if fewer.
    """
    if precision_OG is not None:
        scale_OG = round_to_precision(scale_OG, precision_OG)
    if not isinstance(dtype, torch.dtype):
        return dtype.round(scale_OG)
    limits = torch.finfo(dtype)
    sign = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
    tiny = 2.0**-24 if dtype is torch.float16 else limits.tiny
    return (sign * scale_OG.abs().clamp(tiny, limits.max)).to(dtype)


def count_scale_bits(zero_OG: Tensor, bits: int) -> Tensor:
    """Return how many significant bits a scale may have so that float16 holds its offset.

    Returns:
        int32 (out, groups).

    Raises:
        ValueError: more than `MOST_BITS` bits.
    """
    if bits > MOST_BITS:
        raise ValueError(f"{bits} bits, where {MOST_BITS} is the most")
    n_OG = to_unsigned(zero_OG, bits)
    odd_OG = n_OG // (n_OG & -n_OG).clamp_min(1)
    width_OG = torch.frexp(odd_OG.float()).exponent
    return torch.where(odd_OG <= 1, SIGNIFICANT, SIGNIFICANT - width_OG).to(torch.int32)


def to_unsigned(zero_OG: Tensor, bits: int) -> Tensor:
    """Return n, the zero points as unsigned codes, int32."""
    return zero_OG.to(torch.int32) + (1 << (bits - 1))


def round_to_precision(scale_OG: Tensor, precision_OG: Tensor) -> Tensor:
    """Round each scale to its number of significant bits, and into float16's range."""
    size_OG = scale_OG.abs().clamp(2.0**SMALLEST, LARGEST)
    last_OG = (torch.frexp(size_OG).exponent - precision_OG).clamp_min(SMALLEST)
    unit_OG = torch.ldexp(torch.ones_like(size_OG), last_OG)
    sign_OG = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
    return sign_OG * (size_OG / unit_OG).round() * unit_OG


def _split_groups(W_OI: Tensor, group: int) -> Tensor:
    return W_OI.reshape(W_OI.shape[0], -1, group)


def _find_empty_groups(W_OI: Tensor, group: int) -> Tensor:
    """Return where all weights of a group are 0, bool (out, groups)."""
    rows = W_OI.split(choose_rows(W_OI, CHUNK))
    return torch.cat([~_split_groups(W_RI, group).any(-1) for W_RI in rows])


class _SymmetricTrials:
    """The symmetric grids that the search tries: shrunken ranges with a scale of either sign."""

    def __init__(self, W_OGK: Tensor, spacing: Spacing) -> None:
        largest_OG, (smaller, larger) = W_OGK.abs().amax(-1), spacing.ends
        self._full_OG = _replace_zeros(largest_OG / smaller)
        self._widest_OG = _replace_zeros(largest_OG / larger)

    def plain(self) -> Grid:
        """Return the textbook scale, max|w| / (2^(b-1) - 1) on even levels."""
        return self._full_OG, None

    def coarse(self) -> Iterator[Grid]:
        """Yield every share of the range with either sign."""
        for share in _spread(*SYMMETRIC_SHARES):
            yield self._widest_OG * share, None
            yield self._widest_OG * -share, None

    def around(self, best: Grid) -> Iterator[Grid]:
        """Yield scales between the best one and its neighbours."""
        widest, narrowest = SYMMETRIC_SHARES
        stride_OG = self._widest_OG * ((widest - narrowest) / (STEPS - 1))
        for part in SYMMETRIC_FINER:
            yield best[0] + part * stride_OG, None


class _AsymmetricTrials:
    """The asymmetric grids that the search tries: ranges shrunk at either end on its own."""

    def __init__(self, W_OGK: Tensor, bits: int) -> None:
        self._below_OG = W_OGK.amin(-1).clamp(max=0)
        self._above_OG = W_OGK.amax(-1).clamp(min=0)
        self._low, self._high = get_code_range(bits)

    def plain(self) -> Grid:
        """Return the grid of the whole range."""
        return self._over(self._below_OG, self._above_OG)

    def coarse(self) -> Iterator[Grid]:
        """Yield the grid of every pair of shrunken ends."""
        for left in _spread(*ASYMMETRIC_SHARES):
            for right in _spread(*ASYMMETRIC_SHARES):
                yield self._over(self._below_OG * left, self._above_OG * right)

    def around(self, best: Grid) -> Iterator[Grid]:
        """Yield the best grid's neighbours: scales a little off, zero points one off."""
        scale_OG, zero_OG = best
        assert zero_OG is not None
        for step in (-1, 0, 1):
            shifted_OG = (zero_OG + step).clamp(self._low, self._high)
            for share in ASYMMETRIC_FINER:
                yield scale_OG * share, shifted_OG

    def _over(self, below_OG: Tensor, above_OG: Tensor) -> Grid:
        """Return the grid of the range [below, above], which holds 0."""
        scale_OG = _replace_zeros((above_OG - below_OG) / (self._high - self._low))
        zero_OG = (self._low - below_OG / scale_OG).round_().clamp_(self._low, self._high)
        return scale_OG, zero_OG


def _spread(widest: float, narrowest: float) -> list[float]:
    """Return `STEPS` equally spaced shares."""
    return [widest - (widest - narrowest) * step / (STEPS - 1) for step in range(STEPS)]


def _replace_zeros(scale_OG: Tensor) -> Tensor:
    """Give a group of zeros the scale 1."""
    return torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)


def _fit_chunk(
    W_OGK: Tensor, spacing: Spacing, symmetric: bool, clip: bool, h_GK: Tensor | None
) -> Grid:
    """Return the best grid tried for each group, its scale refitted in closed form."""
    trials: _SymmetricTrials | _AsymmetricTrials
    if symmetric:
        trials = _SymmetricTrials(W_OGK, spacing)
    else:
        trials = _AsymmetricTrials(W_OGK, spacing.bits)
    plain = trials.plain()
    if not clip:
        return plain
    best = plain, _compute_error(W_OGK, plain, spacing, h_GK)
    for trial in trials.coarse():
        best = _keep_better(W_OGK, trial, *best, spacing, h_GK)
    for trial in trials.around(best[0]):
        best = _keep_better(W_OGK, trial, *best, spacing, h_GK)
    return _refit(W_OGK, *best, spacing, h_GK)


def _keep_better(
    W_OGK: Tensor, trial: Grid, best: Grid, least_OG: Tensor, spacing: Spacing, h_GK: Tensor | None
) -> tuple[Grid, Tensor]:
    """Return grids and their errors, each group's trial taken where it lowers the error."""
    error_OG = _compute_error(W_OGK, trial, spacing, h_GK)
    smaller_OG = error_OG < least_OG
    scale_OG = torch.where(smaller_OG, trial[0], best[0])
    zero_OG = best[1]
    if trial[1] is not None and zero_OG is not None:
        zero_OG = torch.where(smaller_OG, trial[1], zero_OG)
    return (scale_OG, zero_OG), torch.where(smaller_OG, error_OG, least_OG)


def _compute_error(W_OGK: Tensor, grid: Grid, spacing: Spacing, h_GK: Tensor | None) -> Tensor:
    """Return the weighted squared error of each group (out, groups)."""
    difference_OGK = _count_steps(W_OGK, grid, spacing).mul_(grid[0].unsqueeze(-1)).sub_(W_OGK)
    squared_OGK = difference_OGK.square_()
    return (squared_OGK if h_GK is None else squared_OGK.mul_(h_GK)).sum(-1)


def _count_steps(W_OGK: Tensor, grid: Grid, spacing: Spacing) -> Tensor:
    """Return code minus zero point: how many scales the rounded weights are away from 0."""
    codes_OGK = encode(W_OGK, spacing, *grid)
    return codes_OGK if grid[1] is None else codes_OGK.sub_(grid[1].unsqueeze(-1))


def _refit(
    W_OGK: Tensor, best: Grid, least_OG: Tensor, spacing: Spacing, h_GK: Tensor | None
) -> Grid:
    """Take one closed-form step of the scale at fixed codes where it lowers the error."""
    scale_OG, zero_OG = best
    q_OGK = _count_steps(W_OGK, best, spacing)
    hq_OGK = q_OGK if h_GK is None else q_OGK * h_GK
    fitted_OG = (hq_OGK * W_OGK).sum(-1) / (hq_OGK * q_OGK).sum(-1).clamp_min(1e-30)
    # a scale is never 0, and beside a zero point always positive
    usable_OG = fitted_OG != 0 if zero_OG is None else fitted_OG > 0
    fitted_OG = torch.where(usable_OG, fitted_OG, scale_OG)
    better_OG = _compute_error(W_OGK, (fitted_OG, zero_OG), spacing, h_GK) < least_OG
    return torch.where(better_OG, fitted_OG, scale_OG), zero_OG
