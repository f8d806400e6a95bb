"""What is refused before it is loaded: each by its own cause, with what to give or type instead."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cptq.artifact.content import build_content
from cptq.checkpoint.load_errors import explain_load_errors, refuse_library_errors
from cptq.checkpoint.loader import load_model, read_spec
from cptq.checkpoint.weights import get_scale_dtype
from cptq.config import ModelSettings
from cptq.errors import ModelError
from tests.conftest import Heard, TinyModel
from tests.unit.checkpoint.made import copied, edit_config, edit_weights, load

#: quantization_config -> what it is called
COMPRESSED: dict[str, dict[str, Any]] = {
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_8bit": True},
    "AutoRound": {"quant_method": "intel/auto-round", "bits": 4},
    "HQQ": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "frob": {"quant_method": "frob"},
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_checkpoint_is_named_and_not_loaded(
    name: str, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(quantization_config=COMPRESSED[name]))
    with pytest.raises(ModelError, match=rf"compressed already \({name}\)") as caught:
        load_model(ModelSettings(model=str(path)), heard, dense=True)
    assert "dense model that it was made from" in str(caught.value)
    assert heard.stages == set()


def test_a_missing_package_is_told_as_that_of_a_compressed_checkpoint() -> None:
    told = pytest.raises(ModelError, match=r"m is compressed already \(GPTQ\).*optimum")
    with told, explain_load_errors("m", "GPTQ"):
        raise ImportError("Loading a GPTQ quantized model requires optimum")


@pytest.mark.parametrize(
    ("tensor", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("SCB", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ],
)
def test_codes_without_a_quantization_config(
    tensor: str, method: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path, name = copied(tiny_model("llama"), tmp_path / "model"), "model.layers.0.mlp.up_proj"
    codes = torch.zeros(6, 80, dtype=torch.int32)
    edit_weights(path, lambda tensors: tensors.update({f"{name}.{tensor}": codes}))
    with pytest.raises(ModelError, match=rf"{method}: it holds {name}\.{re.escape(tensor)}"):
        load(path)


def _to_float8(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        narrow = torch.float8_e4m3fn if "_proj" in name else torch.bfloat16
        tensors[name] = tensor.to(narrow)


def test_8_bit_floats_without_scales_are_weights(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = edit_weights(copied(tiny_model("llama"), tmp_path / "model"), _to_float8)
    name, dense = "model.layers.1.mlp.up_proj", load(tiny_model("llama"))
    model = load(path)
    stored = dense.linear(name).weight.to(torch.float8_e4m3fn).float()  # type: ignore[union-attr]
    assert torch.equal(model.linear(name).weight, stored)  # type: ignore[arg-type]
    spec = next(spec for spec in model.layers if spec.name == name)
    assert spec.dtype == "F8_E4M3"
    assert get_scale_dtype(spec) is torch.bfloat16  # 8-bit floats would round the scales
    build_content(model, (), heard)
    assert heard.notices == []  # float32 holds all of them


@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_8_bit_floats_with_scales_are_codes(
    end: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path, name = copied(tiny_model("llama"), tmp_path / "model"), "model.layers.0.mlp.up_proj"
    edit_weights(path, _to_float8)
    edit_weights(path, lambda tensors: tensors.update({f"{name}.{end}": torch.ones(1)}))
    with pytest.raises(ModelError, match=rf"{name}\.weight as codes \(F8_E4M3\).*{name}\.{end}"):
        load(path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_type_that_torch_does_not_have_is_not_blamed_on_the_tokenizer(
    key: str, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: (config.pop("dtype", None), config.update({key: "float7"})))
    for read in (load, lambda path: read_spec(ModelSettings(model=str(path)), heard)):
        with pytest.raises(ModelError, match=rf"config\.json says {key} 'float7'.*float32"):
            read(path)
    edit_config(path, lambda config: config.update({key: "float16"}))
    assert load(path).tokenizer is not None


def test_an_index_without_metadata(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama", shards=True), tmp_path / "model")
    index = path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["metadata"]
    index.write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r'no "metadata".*add the line "metadata": \{\}'):
        load(path)
    index.write_text(json.dumps({"metadata": {}, **found}))
    assert load(path).fingerprint == load(tiny_model("llama", shards=True)).fingerprint


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_to_be_merged(
    beside_a_model: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    copied(tiny_model("llama"), path) if beside_a_model else path.mkdir()
    base = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (path / "adapter_config.json").write_text(json.dumps(base))
    save_file({"a": torch.ones(2, 2)}, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter \(LORA\) of someone/base") as caught:
        load(path)
    assert f'from_pretrained("{path}").merge_and_unload()' in str(caught.value)


def test_a_sentence_transformers_directory_points_to_its_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("bert-encoder"), tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    places = [{"path": "0_Transformer"}, {"path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(places))
    with pytest.raises(ModelError, match=rf"type {re.escape(str(tmp_path / '0_Transformer'))}$"):
        load(tmp_path)
    assert load(tmp_path / "0_Transformer").kind == "encoder"


@pytest.mark.parametrize("value", [-1, 0])
def test_positions_of_minus_one_are_no_limit(
    value: int, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(max_position_embeddings=value))
    assert read_spec(ModelSettings(model=str(path)), heard).max_positions is None
    assert read_spec(ModelSettings(model=str(tiny_model("llama"))), heard).max_positions == 256


def test_float64_runs_in_float32_and_says_so(tiny_model: TinyModel, heard: Heard) -> None:
    model = load(tiny_model("llama", dtype=torch.float64))
    assert model.dtype is torch.float32
    assert {spec.dtype for spec in model.tensors} == {"F64"}
    build_content(model, (), heard)
    (told,) = heard.notices
    assert told.endswith("written rounded; cptq runs in float32 at most")


RAISE: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.nn.Linear(2, 2)(torch.ones(3, 3)),
    "numpy": lambda: np.testing.assert_array_equal([1], [2]),
}


@pytest.mark.parametrize("library", RAISE)
def test_what_a_library_raises_is_the_models_fault(library: str) -> None:
    with pytest.raises(ModelError, match="m cannot be used"), refuse_library_errors("m"):
        RAISE[library]()


def test_what_cptq_raises_stays_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), refuse_library_errors("m"):
        exec(compile("1 / 0", str(Path(load_model.__code__.co_filename)), "exec"))
