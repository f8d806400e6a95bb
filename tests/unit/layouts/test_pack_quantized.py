"""The tensors of a packed layer are those that packing really gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cptq.layouts.interface import replace_tensors
from cptq.layouts.pack_quantized import PACKED_TENSORS, list_packed_tensors
from cptq.numerics.packing import pack_rows
from cptq.types import LayerSpec, TensorSpec


def layer(out: int, inputs: int, dtype: str = "BF16") -> LayerSpec:
    return LayerSpec(
        name="model.x", block=0, role="q", kind="linear", shape=(out, inputs), dtype=dtype
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (3, 11), (5, 32), (2, 33), (7, 80)])
def test_shapes_are_those_of_the_packed_codes(bits: int, out: int, inputs: int) -> None:
    packed, scale, shape = list_packed_tensors(layer(out, inputs), bits, groups=3)
    words = pack_rows(torch.zeros(out, inputs, dtype=torch.int8), bits)
    assert packed == TensorSpec(name="model.x.weight_packed", dtype="I32", shape=tuple(words.shape))
    assert packed.nbytes == words.nbytes
    assert 8 * packed.nbytes < out * (inputs * bits + 32)
    assert scale == TensorSpec(name="model.x.weight_scale", dtype="BF16", shape=(out, 3))
    assert shape == TensorSpec(name="model.x.weight_shape", dtype="I64", shape=(2,))
    assert PACKED_TENSORS == 3


@pytest.mark.parametrize(("dtype", "scales"), [("F32", "F16"), ("F16", "F16"), ("BF16", "BF16")])
def test_scales_have_the_type_of_the_weight_in_at_most_16_bits(dtype: str, scales: str) -> None:
    assert list_packed_tensors(layer(2, 8, dtype), 4, groups=2)[1].dtype == scales
    expert = replace(layer(2, 8, dtype), name="model.experts.0.x")
    assert list_packed_tensors(expert, 4, groups=2)[1].dtype == dtype


def test_a_weight_is_replaced_in_its_place() -> None:
    dense = [
        TensorSpec(name=f"{name}.weight", dtype="F32", shape=(2, 8))
        for name in ("before", "model.x", "after")
    ]
    packed = list_packed_tensors(layer(2, 8, "F32"), 4, groups=1)
    found = replace_tensors(dense, {"model.x.weight": packed, "not.there": packed})
    assert [spec.name for spec in found] == [
        "before.weight",
        "model.x.weight_packed",
        "model.x.weight_scale",
        "model.x.weight_shape",
        "after.weight",
    ]
    assert replace_tensors(iter(dense), {}) == dense
