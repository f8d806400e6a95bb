"""Refitted scales equal ordinary least squares and never make a row worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics import refit
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16
from cptq.numerics.grid import count_scale_bits, quantize_nearest, round_to_precision
from tests.reference.refit import measure_output_error, naive_refit


def problem(out: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * features)
    X_TI = torch.randn(5 * features, features, generator=generator, dtype=torch.float64)
    X_TI = X_TI @ torch.randn(features, features, generator=generator, dtype=torch.float64)
    W_OI = torch.randn(out, features, generator=generator, dtype=torch.float64)
    return W_OI, X_TI, X_TI.T @ X_TI / len(X_TI)


@pytest.mark.parametrize(("out", "features", "group"), [(3, 21, 7), (5, 15, 15), (2, 24, 3)])
def test_equals_least_squares(out: int, features: int, group: int) -> None:
    W_OI, X_TI, H_II = problem(out, features)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 3, group, scale_dtype=torch.float64)
    fitted_OG = refit.refit_scales(W_OI, H_II, codes_OI, scale_OG)
    expected_OG = naive_refit(W_OI, X_TI, codes_OI, features // group)
    torch.testing.assert_close(fitted_OG, expected_OG, rtol=1e-4, atol=1e-6)


def test_no_row_becomes_worse_in_half_precision() -> None:
    W_OI, _, H_II = problem(7, 33)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 2, 11)
    fitted_OG = refit.refit_scales(W_OI, H_II, codes_OI, scale_OG)
    before_O = measure_output_error(W_OI, H_II, codes_OI, scale_OG)
    after_O = measure_output_error(W_OI, H_II, codes_OI, fitted_OG)
    assert fitted_OG.dtype is torch.float16
    assert bool((after_O <= before_O * (1 + 1e-12)).all())
    assert float(after_O.sum()) < 0.97 * float(before_O.sum())


def test_scales_keep_to_their_significant_bits() -> None:
    W_OI, _, H_II = problem(7, 33)
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI, 4, 11, symmetric=False, float16_offset=True
    )
    steps_OI = codes_OI.short() - zero_OG.short().repeat_interleave(11, dim=1)
    precision_OG = count_scale_bits(zero_OG, 4)
    fitted_OG = refit.refit_scales(W_OI, H_II, steps_OI, scale_OG, precision_OG)
    before_O = measure_output_error(W_OI, H_II, steps_OI, scale_OG)
    after_O = measure_output_error(W_OI, H_II, steps_OI, fitted_OG)
    assert torch.equal(round_to_precision(fitted_OG.double(), precision_OG), fitted_OG.double())
    assert bool((after_O <= before_O * (1 + 1e-12)).all())
    assert float(after_O.sum()) < float(before_O.sum())
    assert fits_float16(compute_minimum(fitted_OG, zero_OG, "Q4_1"))


def test_group_of_zero_codes_keeps_its_scale() -> None:
    W_OI, _, H_II = problem(2, 12)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 4, 4, scale_dtype=torch.float64)
    codes_OI[0, 4:8] = 0
    fitted_OG = refit.refit_scales(W_OI, H_II, codes_OI, scale_OG)
    assert fitted_OG[0, 1] == scale_OG[0, 1]
    assert bool(torch.isfinite(fitted_OG).all())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    W_OI, _, H_II = problem(9, 20)
    codes_OI, scale_OG, _ = quantize_nearest(W_OI, 3, 5, scale_dtype=torch.float64)
    whole = refit.refit_scales(W_OI, H_II, codes_OI, scale_OG)
    for name, size in (("CHUNK", 1), ("GROUPS", 1), ("GROUPS", 3)):
        monkeypatch.setattr(refit, name, size)
        torch.testing.assert_close(refit.refit_scales(W_OI, H_II, codes_OI, scale_OG), whole)
