"""Random packed weights, and what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cptq.inference.operations import PackedWeight
from cptq.layouts.levels import LEVELS, get_levels
from cptq.numerics.packing import pack_values
from cptq.types import Candidate
from tests.reference import packed_products as truth

SCALE_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def make_weight(
    out: int,
    inputs: int,
    *,
    bits: int,
    group: int = 0,
    symmetric: bool = True,
    scales: str = "float16",
    levels: str = "",
    seed: int = 0,
) -> PackedWeight:
    """Random codes and scales; `scales` is a type, or `row` or `row-bfloat16`."""
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // (group or inputs)

    def draw(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=generator).to(torch.uint8)

    factor = None
    if scales.startswith("row"):
        dtype = torch.bfloat16 if scales == "row-bfloat16" else torch.float16
        codes_OG = draw(63, out, groups) + 1
        codes_OG[codes_OG == 32] = 40
        scale = pack_values(codes_OG, 6)
        factor = (torch.rand(out, 1, generator=generator) * 0.01 + 0.001).to(dtype)
    else:
        sign = torch.randn(out, groups, generator=generator).sign() if symmetric else 1.0
        scale = (torch.rand(out, groups, generator=generator) + 0.1) * 0.1 * sign
        scale = scale.to(SCALE_TYPES[scales])
    return PackedWeight(
        scheme=Candidate(
            bits=bits,
            group_size=0 if group == inputs else group,
            symmetric=symmetric,
            scales="row" if factor is not None else "",
            levels=levels,
        ),
        shape=(out, inputs),
        codes=pack_values(draw(1 << bits, out, inputs), bits),
        scale=scale,
        factor=factor,
        zero=None if symmetric else pack_values(draw(1 << bits, out, groups), bits),
    )


def make_weight_in_turn(
    turn: int, out: int, inputs: int, *, bits: int, symmetric: bool = True, **more: Any
) -> PackedWeight:
    """As `make_weight`; every second weight that can have uneven levels has them.

    `turn` counts weights; the tables are taken in turn.
    """
    known = [kind for kind, table in LEVELS.items() if bits in table]
    uneven = known and symmetric and turn % 2
    levels = known[turn // 2 % len(known)] if uneven else ""
    return make_weight(out, inputs, bits=bits, symmetric=symmetric, levels=levels, **more)


def dense(weight: PackedWeight) -> NDArray[np.float64]:
    """The weight (out, in) in float64, wherever it lies."""
    codes, scale, factor, zero = (
        None if part is None else part.cpu()
        for part in (weight.codes, weight.scale, weight.factor, weight.zero)
    )
    assert codes is not None
    assert scale is not None
    return truth.weight(
        codes.numpy(),
        scale.numpy() if factor is not None else scale.double().numpy(),
        None if factor is None else factor.double().numpy(),
        None if zero is None else zero.numpy(),
        weight.scheme.bits,
        weight.shape[1],
        weight.scheme.group_size or weight.shape[1],
        get_levels(weight.scheme.levels, weight.scheme.bits) if weight.scheme.levels else None,
    )
