"""Scales that float16 holds, whatever the checkpoint's type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cptq.compression import COMPRESSORS, nearest
from cptq.compression.half import LEAST, in_half
from cptq.compression.problem import Problem
from cptq.numerics.asymmetric import dequantize_asymmetric
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16
from cptq.numerics.grid import dequantize


def problem(dtype: torch.dtype, size: float = 1.0, **more: Any) -> Problem:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 64, generator=generator) * size
    X = torch.randn(200, 64, generator=generator)
    return Problem(W_OI=W, H_II=X.T @ X / 200, bits=4, group=32, scale_dtype=dtype, **more)


@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_compressor_gives_scales_that_float16_holds(name: str, dtype: torch.dtype) -> None:
    asked = problem(dtype)
    found = in_half(COMPRESSORS.get(name))(asked)
    assert found.scale_OG.dtype is dtype
    assert fits_float16(found.scale_OG)
    error = (dequantize(found.codes_OI, found.scale_OG, torch.float32) - asked.W_OI).norm()
    assert float(error / asked.W_OI.norm()) < 0.2


@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_scales_times_zero_points_are_exact_too(name: str, dtype: torch.dtype, size: float) -> None:
    asked = problem(dtype, size, symmetric=False)
    found = in_half(COMPRESSORS.get(name))(asked)
    assert found.zero_OG is not None
    assert found.scale_OG.dtype is dtype
    assert fits_float16(found.scale_OG)
    assert fits_float16(compute_minimum(found.scale_OG, found.zero_OG, "Q4_1"))
    if size == 1.0:
        read = dequantize_asymmetric(found.codes_OI, found.scale_OG, found.zero_OG, torch.float32)
        assert float((read - asked.W_OI).norm() / asked.W_OI.norm()) < 0.2
        free = COMPRESSORS.get(name)(asked)
        assert free.zero_OG is not None
        held = fits_float16(compute_minimum(free.scale_OG, free.zero_OG, "Q4_1"))
        assert dtype is torch.bfloat16 or not held


def test_a_scale_below_the_bound_is_pulled_up_and_its_codes_rounded_anew() -> None:
    asked = problem(torch.bfloat16, size=1e-5)
    before, after = nearest.compress(asked), in_half(nearest.compress)(asked)
    assert float(before.scale_OG.abs().max()) < LEAST
    assert bool((after.scale_OG.abs() == LEAST).all())
    moved = dequantize(after.codes_OI, after.scale_OG, torch.float64) - dequantize(
        before.codes_OI, before.scale_OG, torch.float64
    )
    assert float(moved.abs().max()) <= LEAST / 2
