"""What a compressor is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One linear: weight W_OI (out, in) float32, its Hessian H_II = E[x x^T], and a grid.

    `group` divides `in`; `scale_dtype` is the storage type of the scales. Where there is a mask,
    bool (out, in), a weight that it leaves out is to become 0. An asymmetric solution has a `zero`,
    and with `half_offset` float16 holds scale times zero point (`numerics.half_offset`).
    """

    W_OI: Tensor
    H_II: Tensor
    bits: int
    group: int
    scale_dtype: torch.dtype
    symmetric: bool = True
    half_offset: bool = False
    mask_OI: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """codes int8 (out, in), scale (out, in / group), zero int8 of that shape where the grid is
    asymmetric, and what a reader must know. A masked weight has the code of 0."""

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None
    notes: tuple[str, ...] = ()


Compressor = Callable[[Problem], Solution]
