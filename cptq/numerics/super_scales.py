"""Scales of ggml's K-quants: an integer code times one float16 factor per super-block.

A super-block is 256 inputs of a row, 16 groups of 16, each with a scale

    s = d c,     c an integer, 1 <= |c| <= C (31 in Q3_K, 127 in Q6_K),     d a float16

Source: ggml's k_quants (ggml-quants.c), which fits d to the scales of a super-block as here, after
the scales. Departures:

- c is never 0: codes of a group are fitted to its scale, and a scale of 0 would erase the group.
- d has few significant bits, so that the product s is exact in the 16 bits that the artifact stores
  a scale in: float16 has 11, so 11 - 5 = 6 remain for d in Q3_K and 11 - 7 = 4 in Q6_K; bfloat16
  has 8, so 3 and 1. So `k` scales are plain 16-bit scales of groups of 16 to every other format and
  every kernel, and nothing is rounded when a GGUF file is written. ggml computes d c in float32,
  which holds it too.

    d = the least number of so many bits with d >= max|s| / C,     c = round(|s| / d), at least 1

Taken apart (`split_supers`), d is the greatest common divisor of the super-block's scales, counted
in units of 2^-24 (float16's smallest number): exact, and unique up to a common factor of the codes.

Cost of the few bits, as output error of GPTQ on two 576 x 1536 linears of smollm2-135m-dithered and
random correlated inputs, against d of 11 bits: Q3_K 0.5% more with 6 bits and 1.2% with 3, Q6_K 1%
less with 4 and 0.2% more with 1. Trying 16 larger d for the least error of the scales moves all of
these by less than 1%. Free 16-bit scales leave 6% less error in Q3_K and 11% less in Q6_K, for half
a bit a weight more: the refit at fixed codes has finer steps.
Limits: a scale below d / 2 becomes d, at most a sixteenth of the largest in Q3_K (a 64th in Q6_K),
or a quarter more in bfloat16. Sizes from 2^-24 to 2^9 C at least (float16's range).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cptq.layouts.gguf import SUPER_GROUPS

#: significant bits of a type that stores scales
SIGNIFICANT = {torch.float16: 11, torch.bfloat16: 8}
#: the smallest number of float16, as a power of two, and the largest magnitude looked at
SMALLEST, LARGEST = -24, 65504.0


@dataclass(frozen=True, slots=True)
class SuperScales:
    """Scales that are codes of at most `most` times a factor per super-block, exact in `dtype`."""

    most: int
    dtype: torch.dtype

    def round(self, scale_OG: Tensor) -> Tensor:
        """Return the nearest scales that are not 0, in `dtype`; those it holds stay as they are.

        Any number of groups is taken; where 16 do not divide them the last super-block is shorter.
        """
        scale_OBK = _split_blocks(scale_OG)
        factor_OB1 = self._choose_factor(scale_OBK.abs().amax(-1, keepdim=True))
        sign_OBK = torch.where(scale_OBK < 0, -1.0, 1.0).to(scale_OG.dtype)
        size_OBK = (scale_OBK.abs() / factor_OB1).round().clamp(1, self.most)
        rounded_OBK = (sign_OBK * size_OBK * factor_OB1).to(self.dtype)
        kept_OB1 = self._find_exact(scale_OBK).unsqueeze(-1)
        found_OBK = torch.where(kept_OB1, scale_OBK.to(self.dtype), rounded_OBK)
        return found_OBK.flatten(1)[:, : scale_OG.shape[1]].contiguous()

    def _choose_factor(self, largest_OB1: Tensor) -> Tensor:
        """Return the least factor for which no scale of the super-block is clipped."""
        bits = SIGNIFICANT[self.dtype] - self.most.bit_length()
        top = 2.0 ** (16 - self.most.bit_length())
        least_OB1 = (largest_OB1 / self.most).clamp(2.0**SMALLEST, top)
        last_OB1 = (torch.frexp(least_OB1).exponent - bits).clamp_min(SMALLEST)
        unit_OB1 = torch.ldexp(torch.ones_like(least_OB1), last_OB1)
        return (least_OB1 / unit_OB1).ceil() * unit_OB1

    def _find_exact(self, scale_OBK: Tensor) -> Tensor:
        """Return the super-blocks whose scales are what this kind holds, bool (out, blocks)."""
        exact_OB = _is_stored(scale_OBK, self.dtype)
        if bool(exact_OB.any()):
            units_MK = _count_units(scale_OBK[exact_OB])
            codes_MK = units_MK // _find_divisor(units_MK)
            exact_OB[exact_OB.clone()] = codes_MK.abs().amax(-1) <= self.most
        return exact_OB


def split_supers(scale_OG: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Take scales of `SuperScales` apart.

    Args:
        scale_OG: (out, groups), a multiple of 16 groups.
        most: the largest code.

    Returns:
        codes int8 (out, groups), none of them 0, and factors float16 (out, groups / 16).

    Raises:
        ValueError: they are no such scales.
    """
    blocks, rest = divmod(scale_OG.shape[1], SUPER_GROUPS)
    if rest:
        raise ValueError(f"{scale_OG.shape[1]} groups are no super-blocks of {SUPER_GROUPS}")
    scale_OBK = scale_OG.reshape(-1, blocks, SUPER_GROUPS)
    if bool(_is_stored(scale_OBK, torch.float32).all()) and bool((scale_OBK != 0).all()):
        units_OBK = _count_units(scale_OBK)
        divisor_OB1 = _find_divisor(units_OBK)
        codes_OBK = units_OBK // divisor_OB1
        factor_OB1 = (divisor_OB1.double() * 2.0**SMALLEST).to(torch.float16)
        exact = factor_OB1.double() * 2.0**-SMALLEST == divisor_OB1
        if bool(exact.all()) and int(codes_OBK.abs().max()) <= most:
            return codes_OBK.to(torch.int8).flatten(1), factor_OB1.squeeze(-1)
    raise ValueError(f"the scales are no codes up to {most} times a float16 per super-block")


def _split_blocks(scale_OG: Tensor) -> Tensor:
    """Return the scales by super-block (out, blocks, 16); a short last one repeats its last."""
    short = -scale_OG.shape[1] % SUPER_GROUPS
    padded_OG = pad(scale_OG, (0, short), mode="replicate") if short else scale_OG
    return padded_OG.view(len(scale_OG), -1, SUPER_GROUPS)


def _is_stored(scale_OBK: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether all scales of a super-block are not 0, in range, whole units and exact in `dtype`."""
    units_OBK = scale_OBK.double() * 2.0**-SMALLEST
    held_OBK = (units_OBK == units_OBK.round()) & (scale_OBK != 0)
    held_OBK &= scale_OBK.abs() <= LARGEST
    return (held_OBK & (scale_OBK.to(dtype).double() == scale_OBK.double())).all(-1)


def _count_units(scale_OBK: Tensor) -> Tensor:
    """Return the scales as int64 multiples of float16's smallest number."""
    return (scale_OBK.double() * 2.0**-SMALLEST).to(torch.int64)


def _find_divisor(units_OBK: Tensor) -> Tensor:
    """Return the greatest common divisor of every super-block, shape (..., 1)."""
    found = units_OBK[..., :1].abs()
    for k in range(1, units_OBK.shape[-1]):
        found = torch.gcd(found, units_OBK[..., k : k + 1])
    return found
