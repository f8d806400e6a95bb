"""One layer: float16 scales, errors and notes, and the weight that ends up in the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.compression import COMPRESSORS, nearest
from cptq.compression.layer import (
    LEAST,
    LayerProblem,
    compress_layer,
    compress_module,
    solve_layer_problem,
)
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16
from cptq.numerics.grid import dequantize, dequantize_layer
from cptq.types import Candidate, LayerSpec
from tests.quick import cover


def problem(dtype: torch.dtype, size: float = 1.0, **more: Any) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 64, generator=generator) * size
    X = torch.randn(200, 64, generator=generator)
    return LayerProblem(W_OI=W, H_II=X.T @ X / 200, bits=4, group=32, scale_dtype=dtype, **more)


@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_compressor_gives_scales_that_float16_holds(name: str, dtype: torch.dtype) -> None:
    asked = problem(dtype)
    found = solve_layer_problem(asked, COMPRESSORS.get(name), float16_scales=True)
    assert found.scale_OG.dtype is dtype
    assert fits_float16(found.scale_OG)
    error = (dequantize(found.codes_OI, found.scale_OG, dtype=torch.float32) - asked.W_OI).norm()
    assert float(error / asked.W_OI.norm()) < 0.2


@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_scales_times_zero_points_are_exact_too(name: str, dtype: torch.dtype, size: float) -> None:
    asked = problem(dtype, size, symmetric=False)
    found = solve_layer_problem(asked, COMPRESSORS.get(name), float16_scales=True)
    assert found.zero_OG is not None
    assert found.scale_OG.dtype is dtype
    assert fits_float16(found.scale_OG)
    assert fits_float16(compute_minimum(found.scale_OG, found.zero_OG, "Q4_1"))
    if size == 1.0:
        read = dequantize(found.codes_OI, found.scale_OG, found.zero_OG, dtype=torch.float32)
        assert float((read - asked.W_OI).norm() / asked.W_OI.norm()) < 0.2
        free = COMPRESSORS.get(name)(asked)
        assert free.zero_OG is not None
        held = fits_float16(compute_minimum(free.scale_OG, free.zero_OG, "Q4_1"))
        assert dtype is torch.bfloat16 or not held


def test_a_scale_below_the_bound_is_pulled_up_and_its_codes_rounded_anew() -> None:
    asked = problem(torch.bfloat16, size=1e-5)
    before = nearest.compress(asked)
    after = solve_layer_problem(asked, nearest.compress, float16_scales=True)
    assert float(before.scale_OG.abs().max()) < LEAST
    assert bool((after.scale_OG.abs() == LEAST).all())
    moved = dequantize(after.codes_OI, after.scale_OG, dtype=torch.float64) - dequantize(
        before.codes_OI, before.scale_OG, dtype=torch.float64
    )
    assert float(moved.abs().max()) <= LEAST / 2


@pytest.mark.parametrize(
    ("asked", "inputs", "used", "note"),
    [
        (16, 48, 16, None),
        (20, 48, 16, "groups of 20 do not divide 48 inputs: groups of 16"),
        (20, 80, 20, None),
        (64, 80, 40, "groups of 64 do not divide 80 inputs: groups of 40"),
        (79, 80, 40, "groups of 79 do not divide 80 inputs: groups of 40"),
        (5, 48, 4, "groups of 5 do not divide 48 inputs: groups of 4"),
        (47, 48, 24, "groups of 47 do not divide 48 inputs: groups of 24"),
        (64, 48, 0, None),
        (0, 80, 0, None),
        (64, 67, 0, "groups of 64 do not divide 67 inputs: one scale per channel"),
    ],
)
def test_a_group_that_does_not_divide_is_replaced_and_noted(
    asked: int, inputs: int, used: int, note: str | None
) -> None:
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(3, inputs), dtype="F16")
    W_OI = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    candidate = Candidate(bits=4, group_size=asked)
    layer = compress_layer(
        spec, W_OI, torch.eye(inputs), candidate, nearest.compress, PACK_QUANTIZED
    )
    assert layer.result.group_size == used
    assert layer.scale.shape == (3, inputs // (used or inputs))
    assert layer.result.notes == (() if note is None else (note,))


@pytest.mark.parametrize(
    ("label", "stored", "dtype", "expert", "size"),
    cover(
        ["w8c-asym", "w8g16", "w3g16-s50", "w2c-asym-2:4"],
        ["F16", "BF16", "F32"],
        [torch.float16, torch.bfloat16, torch.float32],
        [False, True],
        [1e-38, 1e-6, 1.0, 1e4, 1e38],
        at_once=3,
    ),
)
def test_the_module_gets_the_layer_multiplied_out_in_its_type(
    label: str, stored: str, dtype: torch.dtype, expert: bool, size: float
) -> None:
    """Once, in float32, where that has the same bits; scales may be tiny or overflow."""
    name = "mlp.experts.3.up_proj" if expert else "mlp.up_proj"
    spec = LayerSpec(name=name, block=0, role="up", kind="linear", shape=(5, 48), dtype=stored)
    assert spec.expert == expert
    module = torch.nn.Linear(48, 5, dtype=torch.float32)
    W_OI = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * size
    module.weight.data = W_OI.to(TORCH_DTYPES[stored]).nan_to_num().to(dtype).nan_to_num()
    layer = compress_module(
        module, spec, None, Candidate.parse(label), nearest.compress, PACKED_LAYOUT, dtype=dtype
    )
    expected = dequantize_layer(layer, dtype)
    assert module.weight.dtype is expected.dtype is dtype
    assert torch.equal(module.weight.data.nan_to_num(), expected.nan_to_num())
    assert torch.equal(module.weight.data.isnan(), expected.isnan())


def test_an_output_error_needs_a_hessian_and_may_be_left_out() -> None:
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(6, 64), dtype="F32")
    asked, candidate = problem(torch.float32), Candidate(bits=4, group_size=32)
    rest: Any = (candidate, COMPRESSORS.get("gptq"), PACK_QUANTIZED)
    full = compress_layer(spec, asked.W_OI, asked.H_II, *rest)
    assert full.result.output_error is not None
    brief = compress_layer(spec, asked.W_OI, asked.H_II, *rest, measure_output=False)
    assert brief.result.output_error is None
    assert torch.equal(brief.codes, full.codes)
    assert brief.result.weight_error == full.result.weight_error
    blind = compress_layer(spec, asked.W_OI, None, *rest)
    equal = compress_layer(spec, asked.W_OI, torch.eye(64), *rest)
    assert blind.result.output_error is None
    assert torch.equal(blind.codes, equal.codes)  # inputs count as independent and equal
    assert torch.equal(blind.scale, equal.scale)
