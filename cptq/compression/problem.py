"""What a compressor is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cptq.checkpoint.weights import get_storage_dtype
from cptq.layouts.groups import resolve_group
from cptq.layouts.packed import TWO_OF_FOUR
from cptq.numerics.masks import build_magnitude_mask, build_two_of_four_mask
from cptq.types import Candidate, LayerSpec


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


def layer_problem(W_OI: Tensor, H_II: Tensor, spec: LayerSpec, candidate: Candidate) -> Problem:
    """What a compressor is asked when a layer is to become a candidate."""
    return Problem(
        W_OI=W_OI,
        H_II=H_II,
        bits=candidate.bits,
        group=resolve_group(spec.shape[1], candidate.group_size),
        scale_dtype=get_storage_dtype(spec),
        symmetric=candidate.symmetric,
        mask_OI=_mask(W_OI, H_II, candidate),
    )


def _mask(W_OI: Tensor, H_II: Tensor, candidate: Candidate) -> Tensor | None:
    """Which weights a sparse candidate keeps: the largest |w_ij| sqrt(H_jj).

    Source: Wanda (Sun et al., arXiv 2306.11695), there with the same count in every row; here the
    smallest of the whole matrix go, or two of every four inputs.
    """
    if not candidate.sparsity:
        return None
    score_OI = W_OI * H_II.diagonal().clamp_min(0).sqrt()
    if candidate.pattern == TWO_OF_FOUR:
        return build_two_of_four_mask(score_OI)
    return build_magnitude_mask(score_OI, candidate.sparsity)
