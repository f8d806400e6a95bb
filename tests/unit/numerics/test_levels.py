"""Uneven levels: every weight gets the nearest, scales are near the best, and errors fall."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from cptq.layouts.levels import LEVELS, get_levels
from cptq.numerics.grid import dequantize, quantize_nearest
from cptq.numerics.levels import Spacing, to_codes, to_levels
from cptq.numerics.scale_grids import RowScales
from tests.reference import grid as truth

TABLES = [(kind, bits) for kind, tables in LEVELS.items() for bits in tables]


@pytest.mark.parametrize(("kind", "bits"), TABLES)
def test_tables_are_what_the_kernels_expect(kind: str, bits: int) -> None:
    table = LEVELS[kind][bits]
    assert len(table) == 1 << bits
    assert list(table) == sorted(set(table))
    assert table[0] < 0 < table[-1]
    most = {2: 32, 3: 64, 4: 64}.get(bits, 127) if kind == "nl" else 127
    assert Spacing(bits, kind).ends == (table[-1], -table[0])
    assert -table[0] <= most


@pytest.mark.parametrize(("kind", "bits"), TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_become_the_nearest_level(kind: str, bits: int, dtype: torch.dtype) -> None:
    table = get_levels(kind, bits)
    generator = torch.Generator().manual_seed(bits)
    steps = torch.randn(7, 41, generator=generator, dtype=dtype) * 70
    halves = torch.arange(-300, 301, dtype=dtype) / 2
    for numbers in (steps, halves, torch.nextafter(halves, torch.zeros_like(halves)), steps.T):
        found = Spacing(bits, kind).round(numbers.clone())
        assert found.dtype is dtype
        for x, level in zip(numbers.flatten().tolist(), found.flatten().tolist(), strict=True):
            # the upper one of two that are equally near
            assert level == min(table, key=lambda q, x=x: (abs(Fraction(x) - q), -q))


@pytest.mark.parametrize(("kind", "bits"), TABLES)
def test_levels_and_codes_are_inverse(kind: str, bits: int) -> None:
    half, spacing = 1 << (bits - 1), Spacing(bits, kind)
    codes = torch.arange(-half, half, dtype=torch.int8).repeat(3, 1)
    levels = to_levels(codes, spacing)
    assert levels[1].tolist() == list(get_levels(kind, bits))
    assert torch.equal(to_codes(levels, spacing), codes)
    with pytest.raises(ValueError, match="no"):
        to_codes(torch.full((1, 1), -128, dtype=torch.int8), spacing)
    assert to_codes(codes, Spacing(bits)) is codes
    assert to_levels(codes, Spacing(bits)) is codes


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.04), (3, 1.1), (4, 1.25)])
def test_scales_are_near_the_best_of_all(bits: int, slack: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    W_OI = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    table = get_levels("nl", bits)
    levels_OI, scale_OG, _ = quantize_nearest(
        W_OI, bits, 12, scale_dtype=torch.float64, levels="nl"
    )
    found = least = 0.0
    groups = zip(W_OI.view(-1, 12), levels_OI.view(-1, 12), scale_OG.flatten(), strict=True)
    for w_K, q_K, scale in groups:
        w = w_K.tolist()
        nearest = truth.nearest_codes(w, float(scale), bits, table)
        error = truth.squared_error(w, q_K.tolist(), float(scale), [1.0] * 12)
        best = truth.squared_error(w, nearest, float(scale), [1.0] * 12)
        assert error == pytest.approx(best, rel=1e-12)
        found, least = found + error, least + truth.least_error(w, bits, [1.0] * 12, table)
    assert least * (1 - 1e-6) <= found < slack * least


@pytest.mark.parametrize(("kind", "bits"), TABLES)
def test_normal_weights_lose_less_than_on_even_levels(kind: str, bits: int) -> None:
    W_OI = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))

    def measure(levels: str) -> float:
        scales = RowScales(torch.float16)
        q_OI, s_OG, _ = quantize_nearest(W_OI, bits, 32, scale_dtype=scales, levels=levels)
        return float((W_OI - dequantize(q_OI, s_OG, dtype=torch.float32)).square().mean())

    # what the head of `numerics.levels` says, within 3%
    share = {2: 0.87, 3: 0.87, 4: 0.83, 5: 0.81, 6: 0.85}[bits]
    assert measure(kind) / measure("") == pytest.approx(share, rel=0.03)


def test_weights_that_underflow_are_rounded_as_on_even_levels() -> None:
    """A scale that is 0 makes 0 / 0, which is not a number and no level either."""
    assert bool(Spacing(4, "nl").round(torch.tensor([torch.nan, 1.0])).isnan()[0])
    W_OI = torch.zeros(2, 32)
    W_OI[0, 0] = 5e-44
    q_OI, s_OG, _ = quantize_nearest(W_OI, 4, 32, levels="nl")
    assert float(dequantize(q_OI, s_OG, dtype=torch.float32).abs().max()) < 1e-5


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, RowScales(torch.float16)])
def test_a_group_of_zeros_stays_near_zero(scale_dtype: torch.dtype | RowScales) -> None:
    W_OI = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    W_OI[0, 32:64] = 0
    W_OI[2] = 0
    q_OI, s_OG, _ = quantize_nearest(W_OI, 4, 32, scale_dtype=scale_dtype, levels="nl")
    W_found = dequantize(q_OI, s_OG, dtype=torch.float32)
    assert float(W_found[0, 32:64].abs().max()) < 1e-3 * float(W_OI.abs().max())
    assert float(W_found[2].abs().max()) < 1e-6
