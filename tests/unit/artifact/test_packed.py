"""Packed artifacts: whatever a layer can be, in every kind of model, loaded and computed with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import cptq
from cptq.allocation.cost import CostModel, list_layer_tensors
from cptq.artifact.formats.packed import PACKED, check_layer
from cptq.checkpoint.loader import AUTO_CLASSES
from cptq.errors import ArtifactError
from cptq.inference.modules import PackedEmbedding, PackedLinear, PackedModule
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.grid import dequantize_layer
from tests.conftest import TinyModel
from tests.unit.artifact.builders import inputs_of
from tests.unit.artifact.packed_builders import (
    ASYMMETRIC,
    EVERYTHING,
    ROW,
    SPARSE,
    SYMMETRIC,
    TWO_FOUR,
    pack,
    write_packed,
)

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tied": True, "dtype": torch.float16}),
    ("llama", {"tied": False, "intermediate_size": 77, "dtype": torch.bfloat16}),
    ("opt", {"dtype": torch.float16, "ffn_dim": 129}),
    ("bert", {"hidden_size": 96, "intermediate_size": 132}),
    ("bert-mlm", {}),
    ("gpt2", {"n_inner": 77, "dtype": torch.float16}),
    ("mpnet", {}),
    ("qwen3", {"dtype": torch.bfloat16}),
]
KINDS = (SYMMETRIC, ASYMMETRIC, (*SPARSE, "w4g16"), (*TWO_FOUR, "w4g16"), ROW)


@torch.no_grad()
def answer(module: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = module(**inputs)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


CASES: list[Any] = [(*family, EVERYTHING) for family in FAMILIES[:6]]
CASES += [(*FAMILIES[0], labels) for labels in KINDS]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        *((*family, EVERYTHING) for family in FAMILIES[6:]),
        *((*FAMILIES[5], labels) for labels in KINDS),
    )
]


@pytest.mark.parametrize(("arch", "options", "labels"), CASES)
def test_loads_and_computes_the_same(
    tiny_model: TinyModel,
    tmp_path: Path,
    arch: str,
    options: dict[str, Any],
    labels: tuple[str, ...],
) -> None:
    """Weights are equal; products are sums in another order."""
    model, layers, artifact = write_packed(tiny_model(arch, **options), tmp_path / "out", labels)
    auto = getattr(transformers, AUTO_CLASSES[model.kind])
    loaded, info = auto.from_pretrained(
        artifact.path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = inputs_of(model)
    expected = answer(model.module, inputs)
    torch.testing.assert_close(answer(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    for layer in layers:
        module = loaded.get_submodule(layer.spec.name)
        assert isinstance(module, PackedModule), layer.spec.name
        assert torch.equal(module.dequantize(torch.float32), dequantize_layer(layer, torch.float32))
    ways = {layer.spec.kind for layer in layers}
    assert ways >= {"embedding", "conv1d" if arch == "gpt2" else "linear"}


@pytest.mark.parametrize(
    ("labels", "version"),
    [
        (("w4g16",), 1),
        (("w4g16", "w4g16-row"), 2),
        (("w4g16", "w4g16-nl-row"), 5),
    ],
)
def test_only_what_needs_it_is_of_a_later_version(
    tiny_model: TinyModel, tmp_path: Path, labels: tuple[str, ...], version: int
) -> None:
    _, _, artifact = write_packed(tiny_model("llama"), tmp_path / "out", labels)
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == version


def test_the_bytes_are_those_that_are_counted(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, layers, artifact = write_packed(tiny_model("llama"), tmp_path / "out")
    cost = CostModel(model.units, model.tensors, PACKED_LAYOUT)
    with safe_open(artifact.path / "cptq.safetensors", "pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    for layer in layers:
        for spec in list_layer_tensors(layer.spec, layer.result.candidate, PACKED_LAYOUT):
            assert tuple(found[spec.name]) == spec.shape
    assert artifact.weight_bytes == (artifact.path / "cptq.safetensors").stat().st_size
    linear = {layer.spec.name for layer in layers} & {s.name for u in model.units for s in u.layers}
    choices = {
        unit.name: layer.result.candidate
        for unit in model.units
        for layer in layers
        if layer.spec.name in linear and layer.spec.name == unit.layers[0].name
    }
    assert cost.file_bytes(choices) < cost.dense_bytes


@pytest.mark.slow
def test_verified_in_a_fresh_process_that_imports_cptq(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    _, _, artifact = write_packed(
        tiny_model("gpt2", dtype=torch.float16), tmp_path / "out", verify=True
    )
    assert artifact.manifest["verification"]["max_abs_difference"] < 1e-5
    assert artifact.manifest["format"] == "packed"
    card = (artifact.path / "README.md").read_text()
    assert "pip install cptq" in card
    assert "import cptq" in card
    config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "cptq"
    assert "pip install cptq" in config["needs"]


@pytest.mark.parametrize(("arch", "options"), FAMILIES[:2] + FAMILIES[5:6], ids=("t", "u", "g"))
def test_saved_again_key_for_key(
    tiny_model: TinyModel, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    model, _, artifact = write_packed(tiny_model(arch, **options), tmp_path / "out")
    auto = getattr(transformers, AUTO_CLASSES[model.kind])
    loaded = auto.from_pretrained(artifact.path)
    loaded.save_pretrained(tmp_path / "again")
    before = load_file(artifact.path / "cptq.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype
        assert torch.equal(tensor, after[name]), name
    again = auto.from_pretrained(tmp_path / "again")
    inputs = inputs_of(model)
    assert torch.equal(answer(loaded, inputs), answer(again, inputs))


def test_a_tied_head_computes_from_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    _, _, artifact = write_packed(tiny_model("llama", tied=True), tmp_path / "out", ("w6g16-asym",))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(artifact.path)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert isinstance(embedding, PackedEmbedding)
    for part in ("weight", "weight_scale", "weight_zero"):
        assert getattr(head, part) is getattr(embedding, part)
    loaded.tie_weights()
    assert head.weight_scale is embedding.weight_scale
    assert "lm_head.weight" not in load_file(artifact.path / "cptq.safetensors")


@pytest.mark.parametrize(("arch", "options"), [FAMILIES[0], FAMILIES[3], FAMILIES[5], FAMILIES[6]])
def test_load_picks_the_class_and_dequantize_gives_the_dense_model(
    tiny_model: TinyModel, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    model, _, artifact = write_packed(tiny_model(arch, **options), tmp_path / "out")
    loaded = cptq.load(artifact.path, device="cpu")
    assert type(loaded) is type(model.module)
    assert loaded.dtype is torch.float32
    expected, inputs = answer(model.module, inputs_of(model)), inputs_of(model)
    torch.testing.assert_close(answer(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    dense = loaded.dequantize()
    assert not any(isinstance(module, PackedModule) for module in dense.modules())
    assert torch.equal(answer(dense, inputs), expected)
    half = cptq.load(artifact.path, device="cpu", dtype="bfloat16")
    assert half.dtype is torch.bfloat16
    assert answer(half, inputs).dtype is torch.bfloat16


def test_layers_are_read_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    _, layers, artifact = write_packed(tiny_model("gpt2", dtype=torch.float16), tmp_path / "out")
    tensors = load_file(artifact.path / "cptq.safetensors")
    for layer in layers:
        read = PACKED.read_layer(layer.spec, layer.result, tensors.__getitem__)
        values, expected = (dequantize_layer(x, torch.float32) for x in (read, layer))
        assert torch.equal(values, expected)
        name = f"{layer.spec.name}.weight"
        with pytest.raises(ArtifactError, match=f"{layer.spec.name}.*manifest"):
            PACKED.read_layer(
                layer.spec, layer.result, (tensors | {name: tensors[name][:-1]}).__getitem__
            )


def test_layers_that_contradict_themselves_are_refused(tiny_model: TinyModel) -> None:
    from tests.unit.artifact.builders import load

    model = load(tiny_model("llama", dtype=torch.float16))
    layer = pack(model, ("w4g16-s50",))[0][-1]
    assert layer.mask is not None
    check_layer(layer)
    for change, words in [
        ({"codes": layer.codes.int()}, r"codes.*int8.*int32"),
        ({"codes": layer.codes[:, 1:]}, r"codes.*int8"),
        ({"scale": layer.scale.float()}, r"scales.*float16.*float32"),
        ({"scale": layer.scale * 0}, r"scale.*\b0\b"),
        ({"mask": None}, r"mask.*none"),
        ({"mask": torch.ones_like(layer.mask)}, r"[\d,]+ weights.*w4g16-s50.*[\d,]+"),
        ({"zero": layer.scale.to(torch.int8)}, r"zero points.*w4g16-s50"),
    ]:
        with pytest.raises(ArtifactError, match=words):
            check_layer(replace(layer, **change))


GUARD = """
import json, sys, transformers
for path, options in json.loads(sys.argv[1]):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        print("LOADED")
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
print(sorted(m for m in sys.modules if m.split(".")[0] == "cptq"))
"""


@pytest.mark.slow
def test_without_cptq_nothing_is_filled_in_at_random(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The file is not found; and saved again, by whatever name, its shapes do not fit."""
    _, _, artifact = write_packed(
        tiny_model("gpt2", dtype=torch.float16), tmp_path / "out", ("w8c",)
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(artifact.path)
    loaded.save_pretrained(tmp_path / "again")
    places = [
        (str(artifact.path), {}),
        (str(artifact.path), {"ignore_mismatched_sizes": True}),
        (str(tmp_path / "again"), {}),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", GUARD, json.dumps(places)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, third, imported = done.stdout.splitlines()
    assert first.startswith("OSError Error no file named model.safetensors")
    assert second == first
    assert third.startswith("RuntimeError")
    assert "ignore_mismatched_sizes" in third
    assert imported == "[]"
