"""What a compressor is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One linear: weight W_OI (out, in) float32, its Hessian H_II = E[x x^T], and a grid.

    `group` divides `in`; `scale_dtype` is the storage type of the scales.
    """

    W_OI: Tensor
    H_II: Tensor
    bits: int
    group: int
    scale_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """codes int8 (out, in), scale (out, in / group), and what a reader must know."""

    codes_OI: Tensor
    scale_OG: Tensor
    notes: tuple[str, ...] = ()


Compressor = Callable[[Problem], Solution]
