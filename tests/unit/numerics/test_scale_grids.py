"""Narrow scales: what each kind can hold, found by search; and taken apart and joined again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics.float8 import FORMATS
from cptq.numerics.grid import dequantize, quantize_nearest, round_scales
from cptq.numerics.refit import refit_scales
from cptq.numerics.scale_grids import (
    MOST,
    Float8Scales,
    RowScales,
    ScaleType,
    join_rows,
    split_rows,
)
from cptq.numerics.super_scales import SuperScales

KINDS: list[ScaleType] = [
    Float8Scales("e4m3"),
    Float8Scales("e5m2"),
    RowScales(torch.float16),
    RowScales(torch.bfloat16),
    SuperScales(31, torch.float16),
    SuperScales(127, torch.float16),
    SuperScales(31, torch.bfloat16),
]


def draw(out: int = 7, groups: int = 13, size: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(out)
    return size * torch.randn(out, groups, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-4])
def test_float8_scales_are_the_nearest_that_are_not_zero(name: str, size: float) -> None:
    scale_OG = draw(size=size)
    numbers = torch.arange(256, dtype=torch.uint8).view(FORMATS[name]).double()
    numbers = numbers[torch.isfinite(numbers) & (numbers > 0)]
    for value, found in zip(
        scale_OG.flatten().tolist(),
        Float8Scales(name).round(scale_OG).flatten().tolist(),
        strict=True,
    ):
        least = float((numbers - abs(value)).abs().min())
        assert abs(abs(value) - abs(found)) == pytest.approx(least, rel=1e-12)
        assert (found < 0) is (value < 0)
        assert abs(found) in numbers.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-5])
def test_row_scales_are_codes_times_a_factor(dtype: torch.dtype, size: float) -> None:
    scale_OG = draw(size=size)
    found_OG = RowScales(dtype).round(scale_OG)
    codes_OG, factor_O1 = split_rows(found_OG, dtype)
    assert codes_OG.dtype is torch.int8
    assert factor_O1.dtype is dtype
    assert int(codes_OG.abs().max()) <= MOST
    assert bool((codes_OG != 0).all())
    assert torch.equal(join_rows(codes_OG, factor_O1), found_OG)
    for row, rounded, factor in zip(
        scale_OG.tolist(), found_OG.tolist(), factor_O1.flatten().tolist(), strict=True
    ):
        for value, got in zip(row, rounded, strict=True):
            held = [code * factor for code in range(-MOST, MOST + 1) if code * value > 0]
            assert abs(value - got) <= min(abs(value - x) for x in held) + 1e-9 * abs(value)


def test_rows_of_one_tiny_scale_survive() -> None:
    scale_OG = torch.tensor([[1e-7, -1e-7], [0.5, 1e-9], [-3e-6, 2e-6]])
    found_OG = RowScales(torch.float16).round(scale_OG)
    assert bool((found_OG != 0).all())
    assert torch.equal(join_rows(*split_rows(found_OG, torch.float16)), found_OG)


def test_scales_of_another_kind_cannot_be_taken_apart() -> None:
    with pytest.raises(ValueError, match="no 6-bit codes times a factor"):
        split_rows(draw(), torch.float16)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_grids_are_fitted_to_scales_that_the_kind_holds(kind: ScaleType) -> None:
    generator = torch.Generator().manual_seed(3)
    W_OI = torch.randn(9, 48, generator=generator)
    X_TI = torch.randn(200, 48, generator=generator)
    H_II = X_TI.T @ X_TI / len(X_TI)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 3, 8, scale_dtype=kind)
    assert torch.equal(round_scales(scale_OG, kind), scale_OG)
    fitted_OG = refit_scales(W_OI, H_II, codes_OI, scale_OG, scale_dtype=kind)
    assert torch.equal(round_scales(fitted_OG, kind), fitted_OG)
    gaps = [W_OI - dequantize(codes_OI, s, dtype=torch.float32) for s in (scale_OG, fitted_OG)]
    before_O, after_O = (((gap @ H_II) * gap).sum(1) for gap in gaps)
    assert bool((after_O <= before_O * (1 + 1e-6)).all())
    assert float(after_O.sum()) < float(before_O.sum())
