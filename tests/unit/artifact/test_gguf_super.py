"""Q3_K and Q6_K: the weights of the artifact exactly, in every format that holds them."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cptq.allocation.cost import CostModel
from cptq.artifact.content import Content, build_content
from cptq.artifact.formats.gguf import GGUF, measure_sizes
from cptq.artifact.reader import open_artifact
from cptq.checkpoint.model import LoadedModel
from cptq.config import RUNTIMES
from cptq.errors import ArtifactError
from cptq.layouts.gguf import GGUF_LAYOUT
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, CompressedLayer, Plan
from tests.conftest import TinyModel
from tests.quick import cover
from tests.unit.artifact.builders import (
    compress,
    compress_layer,
    load,
    read_gguf_weight,
    write,
    write_gguf,
)

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "head_dim": 128,
    },
    "gpt2": {"n_embd": 256, "n_inner": 512, "n_head": 4},
}
LABELS = ("w3g16-k", "w6g16-k", "w3g16-k", "w6g16-k", "w4g32")
#: layers whose rows do not move, in the checkpoint and in the file
NAMES = {
    "llama": {"model.layers.{}.mlp.down_proj": "ffn_down", "model.layers.{}.mlp.up_proj": "ffn_up"},
    "gpt2": {"transformer.h.{}.attn.c_attn": "attn_qkv", "transformer.h.{}.mlp.c_fc": "ffn_up"},
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def packed(path: Path) -> tuple[LoadedModel, list[CompressedLayer], Content]:
    model, turn = load(path, conv1d=True), cycle(LABELS)
    layers = [
        compress_layer(model, spec, Candidate.parse(next(turn)))
        for spec in model.layers
        if spec.kind in ("linear", "conv1d", "embedding")
    ]
    return model, layers, build_content(model, layers, lambda event: None)


@pytest.mark.parametrize(("arch", "dtype"), cover(NAMES, DTYPES, at_once=1))
def test_every_weight_is_exactly_that_of_the_artifact(
    tiny_model: TinyModel, tmp_path: Path, arch: str, dtype: torch.dtype
) -> None:
    _, _, content = packed(tiny_model(arch, dtype=dtype, **SIZES[arch]))
    reader = write_gguf(content, tmp_path / "out")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    assert {"Q3_K", "Q6_K", "Q4_0"} <= set(kinds.values())
    assert kinds["token_embd.weight"] == "Q3_K"
    assert reader.fields["general.file_type"].contents() in (11, 18)
    for block in range(2):
        for ours, theirs in NAMES[arch].items():
            layer = content.compressed[f"{ours.format(block)}.weight"]
            wanted = dequantize_layer(layer, torch.float32).double().numpy()
            assert np.array_equal(read_gguf_weight(reader, f"blk.{block}.{theirs}.weight"), wanted)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("form", "dtype"), cover(["packed", "compressed-tensors"], DTYPES, at_once=1)
)
def test_an_artifact_keeps_the_scales_and_their_kind(
    tiny_model: TinyModel, tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    model = load(tiny_model("llama", dtype=dtype, **SIZES["llama"]))
    layers = [
        compress_layer(model, spec, Candidate.parse(LABELS[index % 2]))
        for index, unit in enumerate(model.units)
        for spec in unit.layers
    ]
    out = write(model, layers, _plan_for(model, layers), tmp_path / "out", form=form).path
    kept = open_artifact(out).content.compressed
    for layer in layers:
        found = kept[layer.spec.weight_name]
        assert found.result.candidate == layer.result.candidate
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.scale, layer.scale)
        assert found.scale.dtype is (torch.bfloat16 if dtype is torch.bfloat16 else torch.float16)


def _plan_for(model: LoadedModel, layers: list[CompressedLayer]) -> Plan:
    chosen = {layer.spec.name: layer.result.candidate for layer in layers}
    _, plan = compress(load(model.path), bits=(16,))
    choices = {unit.name: chosen[unit.layers[0].name] for unit in model.units}
    return replace(plan, choices=choices)


def _cost_of(path: Path) -> tuple[LoadedModel, CostModel]:
    """The bytes of a GGUF file with the vocabulary packed."""
    model = load(path)
    sizes = measure_sizes(build_content(model, (), lambda event: None))
    units = (*model.units, *model.vocabulary)
    return model, CostModel(units, model.tensors, GGUF_LAYOUT, RUNTIMES["llamacpp"], sizes)


@pytest.mark.parametrize(("bits", "row"), [(3, 110), (6, 210)])
def test_a_target_in_bits_is_the_file_of_k_types(
    tiny_model: TinyModel, bits: int, row: int
) -> None:
    _, cost = _cost_of(tiny_model("llama", dtype=torch.float16, **SIZES["llama"]))
    uniform = Candidate(bits=bits, group_size=16, scales="k")
    whole = cost.file_bytes({unit.name: uniform for unit in cost.units})
    assert cost.count_uniform_bytes(Candidate(bits=bits, group_size=32)) == whole
    padded = [-(-x.numel // 256 * row // 32) * 32 for unit in cost.units for x in unit.layers]
    assert whole == cost.other_bytes + sum(padded)


@pytest.mark.parametrize(("bits", "wider"), [(3, 4), (6, 8)])
def test_a_vocabulary_without_k_types_counts_at_the_width_above(
    tiny_model: TinyModel, bits: int, wider: int
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    model, cost = _cost_of(tiny_model("llama", dtype=torch.float16, **sizes))
    held = Candidate(bits=wider, group_size=32)
    vocabulary = sum(cost.count_unit_bytes(unit.name, held) for unit in model.vocabulary)
    ideal = sum(unit.numel for unit in model.units) * (4 * bits + 2) // 32
    whole = cost.other_bytes + vocabulary + ideal
    assert cost.count_uniform_bytes(Candidate(bits=bits, group_size=32)) == whole


def test_what_no_super_block_holds_is_refused(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", dtype=torch.float16, **SIZES["llama"])
    model, layers, _ = packed(path)
    shifted = [replace(layer, scale=layer.scale * torch.rand_like(layer.scale)) for layer in layers]
    with pytest.raises(ArtifactError, match="no codes up to 31 times a float16 per super-block"):
        GGUF.check(build_content(model, shifted, lambda event: None))
    narrow = load(tiny_model("llama", dtype=torch.float16))
    layer = compress_layer(narrow, narrow.units[0].layers[0], Candidate.parse(LABELS[0]))
    with pytest.raises(ArtifactError, match="48 inputs, which super-blocks of 256 do not divide"):
        GGUF.check(build_content(narrow, [layer], lambda event: None))
