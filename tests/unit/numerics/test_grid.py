"""Grids against exhaustion: every code tried, every scale that can matter tried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics import grid
from cptq.numerics.grid import dequantize, fit_grid, get_code_range, quantize_nearest
from tests.quick import cover
from tests.reference import grid as truth

BITS = range(2, 9)
SHAPES = [(1, 1, 1), (3, 10, 5), (2, 21, 7), (5, 13, 13), (4, 12, 1)]
HALF = [torch.float16, torch.bfloat16]


def weights(out: int, features: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, (out, in) float64."""
    generator = torch.Generator().manual_seed(seed + 100 * out + features)
    return torch.randn(out, features, generator=generator, dtype=torch.float64) ** 3


def group_errors(W_OI: Tensor, codes_OI: Tensor, scale_OG: Tensor, h_I: Tensor) -> Tensor:
    """Weighted squared error of each group, (out * groups,)."""
    D_OI = W_OI - dequantize(codes_OI, scale_OG, dtype=torch.float64)
    return (D_OI.square() * h_I).view(scale_OG.numel(), -1).sum(1)


@pytest.mark.parametrize(
    ("bits", "shape", "scale_dtype"), cover(BITS, SHAPES, [*HALF, torch.float64])
)
def test_every_code_is_the_nearest_on_the_stored_scale(
    bits: int, shape: tuple[int, int, int], scale_dtype: torch.dtype
) -> None:
    out, features, group = shape
    W_OI = weights(out, features)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, group, scale_dtype=scale_dtype)
    assert codes_OI.dtype is torch.int8
    assert codes_OI.shape == W_OI.shape
    assert scale_OG.dtype is scale_dtype
    assert scale_OG.shape == (out, features // group)
    groups = zip(W_OI.view(-1, group), codes_OI.view(-1, group), scale_OG.flatten(), strict=True)
    for w_K, q_K, scale in groups:
        nearest = truth.nearest_codes(w_K.tolist(), float(scale), bits)
        # compared by what they cost: two codes may be equally near
        best = truth.squared_error(w_K.tolist(), nearest, float(scale), [1.0] * group)
        found = truth.squared_error(w_K.tolist(), q_K.tolist(), float(scale), [1.0] * group)
        assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.03), (3, 1.1), (4, 1.25)])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_near_the_best_of_all(bits: int, slack: float, weighted: bool) -> None:
    """At 5 bits and more one lucky scale in thousands beats any search; see the next test."""
    group = 12
    W_OI = weights(5, 24)
    h_I = weights(1, 24, seed=1)[0].abs() + 0.01 if weighted else torch.ones(24).double()
    codes_OI, scale_OG, _ = quantize_nearest(
        W_OI, bits, group, scale_dtype=torch.float64, importance_I=h_I if weighted else None
    )
    found = group_errors(W_OI, codes_OI, scale_OG, h_I)
    h_GK = h_I.view(-1, group).tolist()
    least = [
        truth.least_error(w, bits, h_GK[index % 2])
        for index, w in enumerate(W_OI.view(-1, group).tolist())
    ]
    assert bool((found >= torch.tensor(least).double() * (1 - 1e-6)).all())
    assert float(found.sum()) < slack * sum(least)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1, 6, 16, 48])
@pytest.mark.parametrize("weighted", [False, True])
def test_searching_is_never_worse_than_the_full_range(
    bits: int, group: int, weighted: bool
) -> None:
    W_OI = weights(40, 48)
    h_I = weights(1, 48, seed=1)[0].abs() if weighted else torch.ones(48).double()
    errors = []
    for clip in (True, False):
        codes_OI, scale_OG, _ = quantize_nearest(
            W_OI, bits, group, clip=clip, scale_dtype=torch.float64, importance_I=h_I
        )
        errors.append(group_errors(W_OI, codes_OI, scale_OG, h_I))
    assert bool((errors[0] <= errors[1] * (1 + 1e-9) + 1e-18).all())
    if group > 1:
        assert float(errors[0].sum()) < 0.97 * float(errors[1].sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", HALF)
def test_searching_pays_in_half_precision_too(bits: int, dtype: torch.dtype) -> None:
    W_OI = weights(40, 48).float()
    errors = []
    for clip in (True, False):
        codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 16, clip=clip, scale_dtype=dtype)
        errors.append(
            float((W_OI - dequantize(codes_OI, scale_OG, dtype=torch.float32)).square().sum())
        )
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_without_a_search_the_largest_weight_fixes_the_scale(bits: int) -> None:
    W_OI = weights(4, 20)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 5, clip=False, scale_dtype=torch.float64)
    largest_OG = W_OI.view(4, 4, 5).abs().amax(-1)
    torch.testing.assert_close(scale_OG, largest_OG / get_code_range(bits)[1])
    assert bool((codes_OI.view(4, 4, 5).abs().amax(-1) == get_code_range(bits)[1]).all())


@pytest.mark.parametrize("bits", BITS)
def test_codes_fill_their_range_and_do_not_leave_it(bits: int) -> None:
    low, high = get_code_range(bits)
    assert (low, high) == (truth.all_codes(bits)[0], truth.all_codes(bits)[-1])
    codes_OI, scale_OG, _ = quantize_nearest(weights(30, 64), bits, 32)
    assert low <= int(codes_OI.min()) <= int(codes_OI.max()) <= high
    if bits < 7:  # above, the end of the range is worth little
        assert (int(codes_OI.min()), int(codes_OI.max())) == (low, high)
        assert bool((scale_OG < 0).any())  # the side with one more code goes where it is needed
        assert bool((scale_OG > 0).any())


@pytest.mark.parametrize(
    ("bits", "clip", "scale_dtype", "size"),
    cover(
        BITS,
        [False, True],
        [*HALF, torch.float32],
        [0.0, 1e-45, 1e-38, 1e-30, 1e-9, 1e-4, 1e4, 1e9, 1e30, 3e38],
    ),
)
def test_scales_of_any_size_are_finite_and_not_zero(
    bits: int, clip: bool, scale_dtype: torch.dtype, size: float
) -> None:
    ordinary_OI = weights(2, 8, seed=3).float()
    ordinary_OI /= ordinary_OI.abs().max()
    W_OI = torch.cat([ordinary_OI * size, ordinary_OI], dim=1)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 8, clip=clip, scale_dtype=scale_dtype)
    assert bool(torch.isfinite(scale_OG).all())
    assert bool((scale_OG != 0).all())
    low, high = get_code_range(bits)
    assert low <= int(codes_OI.min()) <= int(codes_OI.max()) <= high
    assert bool(torch.isfinite(dequantize(codes_OI, scale_OG, dtype=torch.float64)).all())
    alone_OI, alone_OG, _ = quantize_nearest(
        ordinary_OI, bits, 8, clip=clip, scale_dtype=scale_dtype
    )
    assert torch.equal(codes_OI[:, 8:], alone_OI)  # a neighbour of another size changes nothing
    assert torch.equal(scale_OG[:, 1:], alone_OG)


@pytest.mark.parametrize("dtype", HALF)
def test_large_weights_come_as_near_as_their_scale_may(dtype: torch.dtype) -> None:
    """Where the best scale overflows, the largest there is; not infinity, not a small one."""
    codes_OI, scale_OG, _ = quantize_nearest(torch.full((1, 4), 3e38), 2, 4, scale_dtype=dtype)
    best = float(dequantize(codes_OI, scale_OG, dtype=torch.float64).abs().max())
    assert 0.99 * min(3e38, torch.finfo(dtype).max) <= best <= 3.01e38


@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_zeros_is_zeros_on_scale_one(bits: int) -> None:
    W_OI = weights(2, 12)
    W_OI[0, 4:8] = 0
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 4)
    assert float(scale_OG[0, 1]) == 1.0
    assert not bool(codes_OI[0, 4:8].any())


@pytest.mark.parametrize("bits", BITS)
def test_the_unit_of_the_weights_does_not_matter(bits: int) -> None:
    """A power of two only moves the exponents: same codes, scaled scales."""
    W_OI = weights(6, 24)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, bits, 8, scale_dtype=torch.float64)
    scaled_OI, scaled_OG, _ = quantize_nearest(W_OI / 1024, bits, 8, scale_dtype=torch.float64)
    assert torch.equal(scaled_OI, codes_OI)
    torch.testing.assert_close(scaled_OG, scale_OG / 1024, rtol=1e-12, atol=0)


def test_an_important_input_is_kept_better() -> None:
    W_OI, h_I = weights(50, 16), torch.ones(16).double()
    plain = quantize_nearest(W_OI, 3, 16, scale_dtype=torch.float64, importance_I=h_I)
    h_I[5] = 100.0
    cared = quantize_nearest(W_OI, 3, 16, scale_dtype=torch.float64, importance_I=h_I)
    one_I = torch.zeros(16).double()
    one_I[5] = 1.0
    before, after = (float(group_errors(W_OI, *found[:2], one_I).sum()) for found in (plain, cared))
    assert after < 0.5 * before


def test_equal_importances_are_none_at_all() -> None:
    W_OI = weights(5, 24)
    for value in (1.0, 8.0):
        h_I = torch.full((24,), value).double()
        assert torch.equal(
            fit_grid(W_OI, 3, 8, scale_dtype=torch.float64, importance_I=h_I)[0],
            fit_grid(W_OI, 3, 8, scale_dtype=torch.float64)[0],
        )


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    W_OI = weights(7, 30)
    whole, _ = fit_grid(W_OI, 3, 10)
    monkeypatch.setattr(grid, "CHUNK", 1)
    assert torch.equal(fit_grid(W_OI, 3, 10)[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dequantize_multiplies_each_code_by_the_scale_of_its_group(dtype: torch.dtype) -> None:
    codes_OI = torch.randint(-8, 8, (3, 15), generator=torch.Generator().manual_seed(0))
    scale_OG = weights(3, 5).to(torch.bfloat16)
    found_OI = dequantize(codes_OI.to(torch.int8), scale_OG, dtype=dtype)
    assert found_OI.dtype is dtype
    for row in range(3):
        for column in range(15):
            expected = codes_OI[row, column].to(dtype) * scale_OG[row, column // 3].to(dtype)
            assert found_OI[row, column] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.int8, torch.int16, None])
def test_dequantize_subtracts_zero_points_and_keeps_exact_zeros(
    dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    """Codes may be of any type, that of the result too, and are not changed."""
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-128, 128, (3, 15), generator=generator).to(stored or dtype)
    zero_OG = torch.randint(-128, 128, (3, 5), generator=generator).to(torch.int8)
    scale_OG = weights(3, 5).to(torch.bfloat16)
    mask_OI = torch.rand(3, 15, generator=generator) < 0.5
    before = codes_OI.clone()
    found_OI = dequantize(codes_OI, scale_OG, zero_OG, mask_OI, dtype=dtype)
    assert torch.equal(codes_OI, before)
    assert found_OI.dtype is dtype
    for row in range(3):
        for column in range(15):
            step = codes_OI[row, column].to(dtype) - zero_OG[row, column // 3].to(dtype)
            value = step * scale_OG[row, column // 3].to(dtype)
            expected = value if mask_OI[row, column] else torch.zeros((), dtype=dtype)
            assert found_OI[row, column] == expected
            assert bool(found_OI[row, column].signbit()) == bool(expected.signbit())
