"""Scales whose product with a zero point float16 holds, as ggml's blocks with a minimum ask.

An asymmetric weight is s * (q - z), codes and zero point in [-2^(b-1), 2^(b-1) - 1]. ggml's Q4_1
and Q5_1 store d * u + m with u = q + 2^(b-1), and d and m in float16, so that

    d = s,      m = -s * n,      n = z + 2^(b-1) in [0, 2^b - 1]

float16 has 11 significant bits. Let n be an odd number of k bits times a power of two: if s has at
most 11 - k of them (all 11 where that odd number is 1, as a power of two moves no bit), s * n fits.
So scales are rounded to so many bits, by their own zero point, before codes are taken. Nothing is
left to round at export.

Range: a scale is a multiple of 2^-24, float16's smallest number, and at most 2^11 (2^11 * 31 is
still below 65504); the same holds in bfloat16, whose 8 bits only round further.

Cost, as squared error of weights rounded to nearest in groups of 32 (192 rows of each of 21 linears
of smollm2-135m-dithered): 0.04% at 4 bits and 0.5% at 5, where a symmetric grid has 13% and 20%
more. At 8 bits a scale would keep 3 bits, and ggml has no such block.
Shapes: scale_OG, zero_OG (out, groups).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: significant bits of a float16, its smallest number as a power of two, and the largest scale
SIGNIFICANT, SMALLEST, LARGEST = 11, -24, 2.0**11
#: most bits of a code for which the bounds above hold
MOST_BITS = 5


def offset_of(zero_OG: Tensor, bits: int) -> Tensor:
    """n, the zero point as an unsigned code, int32."""
    return zero_OG.to(torch.int32) + (1 << (bits - 1))


def offset_precision(zero_OG: Tensor, bits: int) -> Tensor:
    """How many significant bits a scale may have beside its zero point, int32 (out, groups).

    Raises:
        ValueError: more than `MOST_BITS` bits.
    """
    if bits > MOST_BITS:
        raise ValueError(f"{bits} bits, where {MOST_BITS} is the most")
    n_OG = offset_of(zero_OG, bits)
    odd_OG = n_OG // (n_OG & -n_OG).clamp_min(1)
    width_OG = torch.frexp(odd_OG.float()).exponent
    return torch.where(odd_OG <= 1, SIGNIFICANT, SIGNIFICANT - width_OG).to(torch.int32)


def rounded_to(scale_OG: Tensor, precision_OG: Tensor) -> Tensor:
    """Scales rounded to so many significant bits each, and into the range."""
    size_OG = scale_OG.abs().clamp(2.0**SMALLEST, LARGEST)
    last_OG = (torch.frexp(size_OG).exponent - precision_OG).clamp_min(SMALLEST)
    unit_OG = torch.ldexp(torch.ones_like(size_OG), last_OG)
    sign_OG = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
    return sign_OG * (size_OG / unit_OG).round() * unit_OG
