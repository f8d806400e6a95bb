"""Scales of super-blocks: rounded as a search in fractions does, and taken apart exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from cptq.layouts.gguf import SUPER_MOST
from cptq.numerics.grid import dequantize, quantize_nearest
from cptq.numerics.scale_grids import RowScales, ScaleType
from cptq.numerics.super_scales import SIGNIFICANT, SuperScales, split_supers
from tests.reference.super_scales import round_block

DTYPES = [torch.float16, torch.bfloat16]
SIZES = [1.0, 0.02, 1e-6, 3e-9, 1e5]


def draw(size: float, out: int = 3, groups: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(out)
    scale_OG = size * torch.randn(out, groups, generator=generator)
    scale_OG[0, 3] = 0.0
    return scale_OG


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", SUPER_MOST.values())
def test_scales_are_those_of_a_search(most: int, size: float, dtype: torch.dtype) -> None:
    scale_OG, code_bits = draw(size), most.bit_length()
    found_OG = SuperScales(most, dtype).round(scale_OG)
    assert found_OG.dtype is dtype
    for row, rounded in zip(scale_OG.tolist(), found_OG.tolist(), strict=True):
        for start in (0, 16):
            part = slice(start, start + 16)
            bits = SIGNIFICANT[dtype] - code_bits
            d, codes = round_block(row[part], most, bits, 16 - code_bits)
            assert [Fraction(s) for s in rounded[part]] == [code * d for code in codes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("most", SUPER_MOST.values())
def test_rounded_scales_come_apart_and_stay_as_they_are(
    most: int, size: float, dtype: torch.dtype
) -> None:
    kind = SuperScales(most, dtype)
    found_OG = kind.round(draw(size))
    codes_OG, factor_OB = split_supers(found_OG, most)
    assert codes_OG.dtype is torch.int8
    assert factor_OB.dtype is torch.float16
    assert int(codes_OG.abs().max()) <= most
    assert bool((codes_OG != 0).all())
    # ggml multiplies in float32
    joined_OG = codes_OG.float() * factor_OB.float().repeat_interleave(16, dim=1)
    assert torch.equal(joined_OG, found_OG.float())
    assert torch.equal(kind.round(found_OG.float()), found_OG)


def test_scales_without_a_common_factor_cannot_be_taken_apart() -> None:
    assert split_supers(torch.full((1, 16), 65504.0), 31)[1].item() == 65504.0
    for wrong_OG in (
        draw(0.02),
        torch.tensor([[1.0, 32.0] * 8]),
        torch.zeros(2, 16),
        torch.full((1, 16), float("nan")),
        torch.full((1, 16), 2.0**-25),
        torch.full((1, 16), 1e30),
        torch.ones(1, 17),
    ):
        with pytest.raises(ValueError, match=r"no codes up to 31|no super-blocks of 16"):
            split_supers(wrong_OG, 31)


def test_a_last_super_block_may_be_short_while_a_score_is_measured() -> None:
    scale_OG, kind = draw(0.02, groups=21), SuperScales(31, torch.float16)
    found_OG = kind.round(scale_OG)
    assert torch.equal(found_OG[:, :16], kind.round(scale_OG[:, :16]))
    assert torch.equal(found_OG[:, 16:], kind.round(scale_OG[:, 16:]))


@pytest.mark.parametrize("kind", [RowScales(torch.float16), SuperScales(31, torch.bfloat16)])
def test_a_group_of_zeros_does_not_spoil_its_neighbours(kind: ScaleType) -> None:
    W_OI = 0.01 * torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    W_OI[:, 32:48] = 0.0
    W_OI[3] = 0.0
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 3, 16, scale_dtype=kind)
    Q_OI = dequantize(codes_OI, scale_OG, dtype=torch.float32)
    assert bool((Q_OI[:, 32:48] == 0).all())
    assert float((W_OI - Q_OI).square().sum()) < 0.06 * float(W_OI.square().sum())
