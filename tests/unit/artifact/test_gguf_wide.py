"""GGUF beyond symmetric linears: asymmetric grids, GPT-2's Conv1D, classifiers."""

from __future__ import annotations

import importlib.util
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cptq.artifact.content import Content, build_content
from cptq.artifact.formats.gguf import GGUF
from cptq.artifact.gguf.families import FAMILIES
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ArtifactError
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, Event, Notice
from tests.conftest import TinyModel
from tests.quick import cover
from tests.unit.artifact.builders import (
    compress_layer,
    load,
    read_gguf_weight,
    sample_of,
    write_gguf,
)

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2},
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4},
    "bert": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
}
SIZES["bert-encoder"] = SIZES["bert"]
MIXED = ("w4g32-asym", "w5g32-asym", "w8g32", "w4g32")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed (pip install 'cptq[llamacpp]')",
)


def packed(path: Path, labels: tuple[str, ...] = MIXED) -> tuple[LoadedModel, Content]:
    """Layer after layer as the next label says, Conv1D too."""
    model, turn = load(path), cycle(labels)
    layers = [
        compress_layer(model, spec, Candidate.parse(next(turn)))
        for spec in model.layers
        if spec.kind in ("linear", "conv1d")
    ]
    return model, build_content(model, layers, lambda event: None)


#: names of layers whose rows do not move, in the checkpoint and in the file
NAMES = {
    "llama": {"model.layers.{}.mlp.down_proj": "ffn_down", "model.layers.{}.mlp.up_proj": "ffn_up"},
    "gpt2": {"transformer.h.{}.attn.c_attn": "attn_qkv", "transformer.h.{}.mlp.c_fc": "ffn_up"},
    "bert": {"bert.encoder.layer.{}.attention.self.query": "attn_q"},
}


@pytest.mark.parametrize(
    ("arch", "dtype"), cover(NAMES, [torch.float16, torch.bfloat16, torch.float32], at_once=1)
)
def test_every_weight_is_exactly_that_of_the_artifact(
    tiny_model: TinyModel, tmp_path: Path, arch: str, dtype: torch.dtype
) -> None:
    labels = MIXED[:2] if dtype is torch.float32 else MIXED
    _, content = packed(tiny_model(arch, dtype=dtype, **SIZES[arch]), labels)
    reader = write_gguf(content, tmp_path / "out")
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    assert {"Q4_1", "Q5_1"} <= kinds
    for block in range(2):
        for ours, theirs in NAMES[arch].items():
            layer = content.compressed[f"{ours.format(block)}.weight"]
            wanted = dequantize_layer(layer, torch.float64).numpy()
            assert np.array_equal(read_gguf_weight(reader, f"blk.{block}.{theirs}.weight"), wanted)


@needs_llama_cpp
@pytest.mark.parametrize("labels", [("w4g32-asym",), ("w5g32-asym",), MIXED])
@pytest.mark.parametrize("arch", list(SIZES))
def test_llama_cpp_answers_as_the_model_does(
    tiny_model: TinyModel, tmp_path: Path, arch: str, labels: tuple[str, ...]
) -> None:
    path = tiny_model(arch, dtype=torch.float16, **SIZES[arch])
    model, content = packed(path, labels)
    write_gguf(content, tmp_path / "out")
    sample = sample_of(model)
    found = GGUF.check_reload(tmp_path / "out", model.kind, sample, lambda event: None, path)
    assert found.max_abs_difference is not None
    assert 0 < found.max_abs_difference < 0.05 * float(sample.expected.abs().max())


@needs_llama_cpp
def test_a_classifier_with_its_head_in_the_wrong_order_is_found(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, content = packed(tiny_model("bert", dtype=torch.float16, **SIZES["bert"]))
    family = FAMILIES["bert", "classifier"]
    monkeypatch.setattr(type(family), "known_name", _swapped)
    write_gguf(content, tmp_path / "out")
    with pytest.raises(ArtifactError):
        GGUF.check_reload(tmp_path / "out", model.kind, sample_of(model), lambda event: None)


def _swapped(family: Any, tensor: str) -> str:
    """Pooler and head under each other's name."""
    module, _, part = tensor.removeprefix(family.prefix).rpartition(".")
    swapped = {"pooler.dense": "classifier.out_proj", "classifier": "classifier.dense"}
    return f"{swapped.get(module, module)}.{part}"


def test_a_classifier_keeps_its_labels_and_says_what_differs(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    labels = {0: "negative", 1: "positive"}
    path = tiny_model("bert", dtype=torch.float16, id2label=labels, **SIZES["bert"])
    events: list[Event] = []
    reader = write_gguf(packed(path)[1], tmp_path / "out", events)
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["bert.classifier.output_labels"] == ["negative", "positive"]
    assert found["bert.pooling_type"] == gguf.PoolingType.RANK
    names = {tensor.name for tensor in reader.tensors}
    assert names >= {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"}
    notices = [(event.kind, event.subject) for event in events if isinstance(event, Notice)]
    assert ("warning", "token types") in notices


def test_what_no_block_holds_is_refused(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", dtype=torch.float16, **SIZES["llama"])
    with pytest.raises(ArtifactError, match="asymmetric codes of 8 bits, but of 4, 5"):
        GGUF.check(packed(path, ("w8g32-asym",))[1])


def test_zero_points_that_float16_does_not_hold_are_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.artifact.builders.MOST_BITS", 0)
    path = tiny_model("llama", dtype=torch.float16, **SIZES["llama"])
    with pytest.raises(ArtifactError, match=r"zero points.*float16"):
        GGUF.check(packed(path, ("w4g32-asym",))[1])


def test_a_head_that_llama_cpp_does_not_compute_is_refused(tiny_model: TinyModel) -> None:
    model, content = packed(tiny_model("bert-mlm", dtype=torch.float16, **SIZES["bert"]))
    assert model.kind == "masked-lm"
    with pytest.raises(ArtifactError, match=r"bert masked-lm.*; allowed: .*bert classifier"):
        GGUF.check(content)
