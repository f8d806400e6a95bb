"""Scales stored in fewer than 16 bits: 8-bit floats, or integer codes times one factor.

A scale of 16 bits among 64 inputs takes 0.25 bits a weight. It need not be so exact: codes are
fitted to whatever the scale is, so a scale that is off by a few per cent costs next to nothing, and
the bits are better spent on more scales.

| kind | a scale is                                | bits a weight, 32 inputs a scale |
|------|-------------------------------------------|----------------------------------|
| e4m3 | an 8-bit float (`numerics.float8`)         | 0.25                             |
| e5m2 | an 8-bit float of wider range              | 0.25                             |
| row  | c f, c a 6-bit integer in -31..31 not 0,  | 0.19 and 16 per row              |
|      | f one 16-bit float per row                |                                  |
| k    | c d, d one float16 per 256 inputs; 16 bits except in a GGUF file (`super_scales`) | |

`row` is what ggml's K-quants and QLoRA's double quantization (Dettmers et al., arXiv 2305.14314,
section 3) do, with a whole row as the outer block and a sign, since scales here have one. f is the
row's largest |s| / 31.

Such scales are kept in memory as float32 numbers that their kind holds exactly, and taken apart
where they are written (`split_rows`). A group of zeros has no scale of its own: it comes as 0 and
gets the smallest, so that it does not spoil the scales that it shares a factor with.
Limits: e4m3 loses precision below 2^-6, e5m2 below 2^-14; a group of `row` with a scale below a
sixtieth of its row's largest gets a scale that is too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cptq.layouts.packed import ROW_BITS
from cptq.numerics.float8 import FORMATS, round_to_float8
from cptq.numerics.super_scales import SuperScales

#: the largest code of `row`
MOST = (1 << (ROW_BITS - 1)) - 1


@dataclass(frozen=True, slots=True)
class Float8Scales:
    """Scales that are 8-bit floats; `name` as in `numerics.float8`."""

    name: str

    def round(self, scale_OG: Tensor) -> Tensor:
        """Return the nearest scales that are not 0, float32."""
        least = torch.finfo(FORMATS[self.name]).smallest_normal
        least *= 2.0**-3 if self.name == "e4m3" else 2.0**-2  # the smallest number of all
        sign_OG = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
        return round_to_float8(sign_OG * scale_OG.abs().clamp_min(least), self.name).float()


@dataclass(frozen=True, slots=True)
class RowScales:
    """Scales that are codes times a factor per row; `dtype` is that of the factor."""

    dtype: torch.dtype

    def round(self, scale_OG: Tensor) -> Tensor:
        """Return the nearest scales that are not 0, float32."""
        least = 2.0**-24 if self.dtype is torch.float16 else torch.finfo(self.dtype).tiny
        factor_O1 = scale_OG.abs().amax(1, keepdim=True) / MOST
        factor_O1 = factor_O1.clamp(least, torch.finfo(self.dtype).max / MOST).to(self.dtype)
        factor_O1 = factor_O1.to(scale_OG.dtype)
        sign_OG = torch.where(scale_OG < 0, -1.0, 1.0).to(scale_OG.dtype)
        size_OG = (scale_OG.abs() / factor_O1).round().clamp(1, MOST)
        return (sign_OG * size_OG * factor_O1).float()


#: a torch type, or a narrower way to store scales
ScaleType = torch.dtype | Float8Scales | RowScales | SuperScales


def split_rows(scale_OG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take scales of `RowScales` apart: codes int8 (out, groups), factors (out, 1) in `dtype`.

    Raises:
        ValueError: they are no such scales.
    """
    exact_OG, factor_O1 = scale_OG.double(), torch.zeros_like(scale_OG[:, :1], dtype=dtype)
    open_O = torch.ones(len(scale_OG), dtype=torch.bool, device=scale_OG.device)
    # a row's largest code is 31, but less where the factor was as small as its type allows
    for most in range(MOST, 0, -1):
        if not bool(open_O.any()):
            break
        trial_O1 = (exact_OG.abs().amax(1, keepdim=True) / most).to(dtype)
        codes_OG = (exact_OG / trial_O1.double()).round()
        found_O = open_O & (codes_OG * trial_O1.double() == exact_OG).all(1)
        factor_O1[found_O] = trial_O1[found_O]
        open_O &= ~found_O
    codes_OG = (exact_OG / factor_O1.double()).round()
    if bool(open_O.any()) or bool((codes_OG == 0).any()):
        raise ValueError("the scales are no 6-bit codes times a factor per row")
    return codes_OG.to(torch.int8), factor_O1


def join_rows(codes_OG: Tensor, factor_O1: Tensor) -> Tensor:
    """Return the scales of codes and factors, float32; the inverse of `split_rows`."""
    return codes_OG.float() * factor_O1.float()
