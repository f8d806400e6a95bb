"""A weight is (out, in) whatever the module keeps, and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint.files import read_header
from cptq.checkpoint.weights import (
    TORCH_DTYPES,
    get_storage_dtype,
    get_weight,
    replace_weight,
    set_weight,
)
from cptq.types import DTYPE_BYTES, LayerSpec
from tests.conftest import TinyModel
from tests.unit.checkpoint.made import load

OUT, INPUTS = 5, 3


def module(kind: str) -> nn.Module:
    """Weight (out, in) = 0, 1, 2 ... in reading order."""
    made = nn.Linear(INPUTS, OUT) if kind == "linear" else Conv1D(OUT, INPUTS)
    counted_OI = torch.arange(float(OUT * INPUTS)).view(OUT, INPUTS)
    with torch.no_grad():
        made.weight.copy_(counted_OI if kind == "linear" else counted_OI.T)
    return made


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_is_what_the_module_multiplies_with(kind: str) -> None:
    made = module(kind)
    W_OI = get_weight(made)
    assert W_OI.tolist() == torch.arange(15.0).view(OUT, INPUTS).tolist()
    assert not W_OI.requires_grad
    x = torch.tensor([[1.0, 10.0, 100.0]])
    torch.testing.assert_close(made(x), x @ W_OI.T + made.bias)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_weight_is_set_in_place(kind: str) -> None:
    made = module(kind)
    parameter, new_OI = made.weight, torch.randn(OUT, INPUTS)
    set_weight(made, new_OI)
    assert made.weight is parameter
    assert torch.equal(get_weight(made), new_OI)
    set_weight(made, get_weight(made).clone())
    assert torch.equal(get_weight(made), new_OI)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_setting_keeps_the_type_of_the_module(dtype: torch.dtype) -> None:
    made = module("linear").to(dtype)
    new_OI = torch.full((OUT, INPUTS), 1 / 3, dtype=torch.float64)
    set_weight(made, new_OI)
    assert made.weight.dtype is dtype
    assert torch.equal(get_weight(made), new_OI.to(dtype))


def test_a_transposed_weight_is_refused() -> None:
    with pytest.raises(RuntimeError):
        set_weight(module("linear"), torch.zeros(INPUTS, OUT))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_replaced_restores_also_after_an_error(kind: str) -> None:
    made = module(kind)
    before_OI, other_OI = get_weight(made).clone(), torch.randn(OUT, INPUTS)
    with replace_weight(made, other_OI):
        assert torch.equal(get_weight(made), other_OI)
    assert torch.equal(get_weight(made), before_OI)
    with pytest.raises(ZeroDivisionError), replace_weight(made, other_OI):
        raise ZeroDivisionError
    assert torch.equal(get_weight(made), before_OI)


@pytest.mark.parametrize("name", list(DTYPE_BYTES))
def test_every_storage_type_is_the_one_of_safetensors(name: str, tmp_path) -> None:
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(2, 2), dtype=name)
    dtype = get_storage_dtype(spec)
    assert dtype.itemsize == DTYPE_BYTES[name]
    save_file({"x": torch.zeros(2, 2).to(dtype)}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors")["x"].dtype == name
    assert set(TORCH_DTYPES) == set(DTYPE_BYTES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_storage_type_survives_loading_in_another(
    dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = load(tiny_model("llama", dtype=dtype))
    assert {get_storage_dtype(spec) for spec in model.layers} == {dtype}
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    half = load(tiny_model("llama", dtype=dtype), dtype="bfloat16")
    assert {get_storage_dtype(spec) for spec in half.layers} == {dtype}
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.bfloat16}
    assert half.dtype is torch.bfloat16
