"""Asymmetric grids against exhaustion, and the exact zero that masks rely on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics import grid
from cptq.numerics.grid import code_range, dequantize, fit_grid, quantize_nearest
from tests.reference import asymmetric as truth

BITS = range(2, 9)
SHAPES = [(1, 1, 1), (3, 10, 5), (2, 21, 7), (5, 13, 13), (4, 12, 1)]


def weights(out: int, features: int, seed: int = 0) -> Tensor:
    """Heavy-tailed and off centre, (out, in) float64."""
    generator = torch.Generator().manual_seed(seed + 100 * out + features)
    return torch.randn(out, features, generator=generator, dtype=torch.float64) ** 3 + 0.7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "features", "group"), SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_code_is_the_nearest_on_the_stored_grid(
    bits: int, out: int, features: int, group: int, scale_dtype: torch.dtype
) -> None:
    W_OI = weights(out, features)
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI, bits, group, symmetric=False, scale_dtype=scale_dtype
    )
    assert codes_OI.dtype is zero_OG.dtype is torch.int8
    assert scale_OG.dtype is scale_dtype
    assert scale_OG.shape == zero_OG.shape == (out, features // group)
    low, high = code_range(bits)
    assert low <= int(zero_OG.min()) <= int(zero_OG.max()) <= high
    assert bool((scale_OG > 0).all())
    rows = zip(
        W_OI.view(-1, group).tolist(),
        codes_OI.view(-1, group).tolist(),
        scale_OG.flatten().tolist(),
        zero_OG.flatten().tolist(),
        strict=True,
    )
    for w_K, q_K, scale, zero in rows:
        nearest = truth.nearest_codes(w_K, scale, zero, bits)
        ones = [1.0] * group
        best = truth.squared_error(w_K, nearest, scale, zero, ones)
        assert truth.squared_error(w_K, q_K, scale, zero, ones) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.1), (3, 1.05)])
@pytest.mark.parametrize("weighted", [False, True])
def test_grids_are_near_the_best_of_all(bits: int, slack: float, weighted: bool) -> None:
    group = 8
    W_OI = weights(8, 16)
    h_I = weights(1, 16, seed=1)[0].abs() + 0.01 if weighted else torch.ones(16).double()
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI,
        bits,
        group,
        symmetric=False,
        scale_dtype=torch.float64,
        importance_I=h_I if weighted else None,
    )
    D_OI = W_OI - dequantize(codes_OI, scale_OG, zero_OG, dtype=torch.float64)
    found = (D_OI.square() * h_I).view(-1, group).sum(1)
    importance = h_I.view(-1, group).repeat(8, 1)
    best = torch.tensor(
        [
            truth.least_error(w_K, bits, h_K)
            for w_K, h_K in zip(W_OI.view(-1, group).tolist(), importance.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    assert bool((found >= best - 1e-12).all())
    assert float(found.sum() / best.sum()) < slack


@pytest.mark.parametrize("bits", BITS)
def test_never_worse_than_the_plain_range(bits: int) -> None:
    """The grid of GPTQ's released code: scale = range / (2^b - 1), zero = round(-min / scale)."""
    W_OI = weights(7, 24)
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI, bits, 8, symmetric=False, scale_dtype=torch.float64
    )
    found = (W_OI - dequantize(codes_OI, scale_OG, zero_OG, dtype=torch.float64)).square()
    low, high = code_range(bits)
    for w_K, error in zip(W_OI.view(-1, 8), found.view(-1, 8).sum(1), strict=True):
        bottom, top = min(0.0, float(w_K.min())), max(0.0, float(w_K.max()))
        scale = (top - bottom) / (high - low)
        zero = max(low, min(high, round(low - bottom / scale)))
        codes = truth.nearest_codes(w_K.tolist(), scale, zero, bits)
        plain = truth.squared_error(w_K.tolist(), codes, scale, zero, [1.0] * 8)
        assert float(error) <= plain * (1 + 1e-12)


def test_off_centre_groups_gain_over_a_symmetric_grid() -> None:
    W_OI = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)).double() + 0.05
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 3, 32, scale_dtype=torch.float64)
    one_sided = (W_OI - dequantize(codes_OI, scale_OG, dtype=torch.float64)).square().sum()
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI, 3, 32, symmetric=False, scale_dtype=torch.float64
    )
    both = (W_OI - dequantize(codes_OI, scale_OG, zero_OG, dtype=torch.float64)).square().sum()
    assert float(both) < 0.5 * float(one_sided)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_a_masked_weight_is_exactly_zero(bits: int, shift: float) -> None:
    """Mask first, grid after: in groups that lie to either side of 0 too."""
    generator = torch.Generator().manual_seed(bits)
    W_OI = torch.randn(9, 33, generator=generator).double() + shift
    mask_OI = torch.rand(9, 33, generator=generator) < 0.5
    codes_OI, scale_OG, zero_OG = quantize_nearest(W_OI * mask_OI, bits, 11, symmetric=False)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        read_OI = dequantize(codes_OI, scale_OG, zero_OG, dtype=dtype)
        assert bool((read_OI[~mask_OI] == 0).all())


def test_groups_of_zeros_and_empty_sides() -> None:
    W_OI = torch.tensor([[0.0, 0.0, 1.0, 2.0, -1.0, -3.0]]).double()
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI, 4, 2, symmetric=False, scale_dtype=torch.float64
    )
    assert bool((scale_OG > 0).all())
    assert zero_OG.tolist() == [[-8, -8, 7]]
    assert torch.allclose(dequantize(codes_OI, scale_OG, zero_OG, dtype=torch.float64), W_OI)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W_OI = weights(23, 45)
    whole = fit_grid(W_OI, 3, 9, symmetric=False)
    monkeypatch.setattr(grid, "CHUNK", 100)
    assert all(
        torch.equal(a, b) for a, b in zip(whole, fit_grid(W_OI, 3, 9, symmetric=False), strict=True)
    )
