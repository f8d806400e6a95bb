"""Rounded scales: the product with the zero point is a float16, and nothing nearer would do."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from cptq.numerics.grid import (
    LARGEST,
    code_range,
    count_scale_bits,
    dequantize,
    quantize_nearest,
    round_to_precision,
)
from tests.reference import float16_offset as truth


def zeros(bits: int) -> torch.Tensor:
    low, high = code_range(bits)
    return torch.arange(low, high + 1, dtype=torch.int8)[None]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_as_many_bits_as_float16_allows_and_no_more(bits: int) -> None:
    found = count_scale_bits(zeros(bits), bits)[0].tolist()
    half = 1 << (bits - 1)
    assert found == [truth.most_bits(int(zero) + half) for zero in zeros(bits)[0]]


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("size", [1e-9, 2e-7, 1e-5, 0.01, 0.7, 300.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_product_is_exact_and_every_scale_the_nearest(
    bits: int, size: float, dtype: torch.dtype
) -> None:
    zero = zeros(bits).repeat(5, 1)
    generator = torch.Generator().manual_seed(bits)
    scale = (torch.rand(zero.shape, generator=generator, dtype=dtype) + 0.5) * size
    precision = count_scale_bits(zero, bits)
    found = round_to_precision(scale, precision)
    half = 1 << (bits - 1)
    rows = (scale.flatten(), found.flatten(), zero.flatten(), precision.flatten())
    for wanted, got, z, most in zip(*(row.tolist() for row in rows), strict=True):
        assert truth.half_holds(Fraction(got))
        assert truth.half_holds(Fraction(got) * (z + half))
        inside = min(max(Fraction(wanted), Fraction(1, 2**24)), Fraction(LARGEST))
        assert Fraction(got) in truth.nearest(inside, most)


def test_a_sign_is_kept_and_nothing_becomes_zero() -> None:
    scale = torch.tensor([[-0.3, 0.0, -1e-30, 0.3]])
    found = round_to_precision(scale, torch.full((1, 4), 7))
    assert found.sign().tolist() == [[-1.0, 1.0, -1.0, 1.0]]
    assert float(found[0, 0]) == -float(found[0, 3])


@pytest.mark.parametrize(("bits", "cost"), [(4, 1.003), (5, 1.02)])
def test_it_costs_little_beside_what_the_grid_gains(bits: int, cost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W_OI = torch.randn(64, 256, generator=generator) + 0.3

    def error(float16_offset: bool) -> float:
        grid = quantize_nearest(W_OI, bits, 32, symmetric=False, float16_offset=float16_offset)
        return float((dequantize(*grid, dtype=torch.float32) - W_OI).square().sum())

    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 32)
    even = codes_OI.float() * scale_OG.float().repeat_interleave(32, dim=1)
    assert error(False) < error(True) < cost * error(False)
    assert error(True) < 0.9 * float((even - W_OI).square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_stored_in_any_type_the_product_is_exact(dtype: torch.dtype, size: float) -> None:
    W_OI = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * size
    _, scale_OG, zero_OG = quantize_nearest(
        W_OI, 5, 32, symmetric=False, scale_dtype=dtype, float16_offset=True
    )
    assert scale_OG.dtype is dtype
    for scale, zero in zip(scale_OG.flatten().tolist(), zero_OG.flatten().tolist(), strict=True):
        assert truth.half_holds(Fraction(scale))
        assert truth.half_holds(Fraction(scale) * (zero + 16))


def test_more_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bits, where 5 is the most"):
        count_scale_bits(zeros(8), 8)
