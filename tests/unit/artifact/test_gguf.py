"""A GGUF file holds exactly the weights of the artifact, its tokenizer and its settings."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cptq.artifact.content import Content, build_content
from cptq.artifact.formats.gguf import GGUF
from cptq.artifact.gguf.families import FAMILIES, compute_rope_factors, find_family
from cptq.artifact.gguf.vocabulary import find_pre_tokenizer, find_tokenizer_model, read_tokenizer
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ArtifactError
from cptq.types import CompressedLayer, Notice
from tests.conftest import TinyModel
from tests.unit.artifact.builders import compress, load, read_gguf_weight, sample_of, write_gguf

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": torch.float16,
}


def made(
    path: Path, widths: tuple[int, ...] = (4, 5, 8, 16)
) -> tuple[LoadedModel, list[CompressedLayer], Content]:
    model = load(path)
    layers, _ = compress(model, bits=widths)
    return model, layers, build_content(model, layers, lambda event: None)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: within a head, first and second half take turns."""
    half = len(weight) // heads // 2
    order = [h * 2 * half + p * half + i for h in range(heads) for i in range(half) for p in (0, 1)]
    return weight[order]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_weight_is_exactly_that_of_the_model(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tiny_model("llama", **(SIZES | {"head_dim": 16, "dtype": dtype}))
    model, layers, content = made(path)
    reader = write_gguf(content, tmp_path / "out")
    state = {n: t.double().numpy() for n, t in model.module.state_dict().items()}
    ours = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"
    theirs = "attn_q", "attn_k", "attn_v", "ffn_down"
    assert len({layer.result.candidate.bits for layer in layers}) == 3
    for block in range(2):
        for our, their, heads in zip(ours, theirs, (4, 2, 0, 0), strict=True):
            weight = state[f"model.layers.{block}.{our}.weight"]
            weight = interleaved(weight, heads) if heads else weight
            assert np.array_equal(read_gguf_weight(reader, f"blk.{block}.{their}.weight"), weight)
    for our, their in (("model.norm", "output_norm"), ("model.embed_tokens", "token_embd")):
        assert np.array_equal(read_gguf_weight(reader, f"{their}.weight"), state[f"{our}.weight"])


def test_a_conv1d_is_turned_over(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, _, content = made(tiny_model("gpt2", n_embd=64, n_inner=96, n_head=4))
    reader = write_gguf(content, tmp_path / "out")
    weight = model.module.state_dict()["transformer.h.1.mlp.c_fc.weight"].double().numpy()
    assert np.array_equal(read_gguf_weight(reader, "blk.1.ffn_up.weight"), weight.T)


def test_settings_and_vocabulary_are_inside(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama", **SIZES)
    reader = write_gguf(made(path)[2], tmp_path / "out")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.head_count_kv"] == 2
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.bos_token_id"] == 1
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(found["tokenizer.ggml.tokens"][i] == text for text, i in vocabulary.items())
    assert len(found["tokenizer.ggml.tokens"]) == 300


def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_merges(stories: Path) -> None:
    data = read_tokenizer(stories)
    assert find_tokenizer_model(data) == "llama"


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed (pip install 'cptq[llamacpp]')",
)
def test_llama_cpp_cuts_text_into_the_same_tokens(stories: Path, tmp_path: Path) -> None:
    model, _, content = made(stories, widths=(16,))
    write_gguf(content, tmp_path / "out")
    events: list[Any] = []
    found = GGUF.check_reload(
        tmp_path / "out", model.kind, sample_of(model), events.append, stories
    )
    assert found.max_abs_difference is not None
    assert found.max_abs_difference < 1e-3
    assert [e for e in events if isinstance(e, Notice)] == []


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_rows_in_the_wrong_order_are_found(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, content = made(tiny_model("llama", **SIZES))
    monkeypatch.setattr("cptq.artifact.formats.gguf.row_order", lambda *_: None)
    write_gguf(content, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"llama\.cpp.*0\.1 is allowed"):
        GGUF.check_reload(tmp_path / "out", model.kind, sample_of(model), lambda event: None)


def test_without_llama_cpp_it_is_said_that_nothing_ran(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, content = made(tiny_model("llama", **SIZES))
    write_gguf(content, tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    events: list[Any] = []
    found = GGUF.check_reload(tmp_path / "out", model.kind, sample_of(model), events.append)
    assert found.max_abs_difference is None
    assert events[0].kind == "warning"
    assert "llama-cpp-python" in events[0].message


def test_layers_that_no_block_holds_are_named(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))  # 48 and 80 inputs
    layers, _ = compress(model, bits=(4,))
    content = build_content(model, layers, lambda event: None)
    with pytest.raises(ArtifactError, match=r"q_proj.* and \d+ more: .*48 inputs"):
        GGUF.check(content)


def test_scales_that_float16_rounds_are_refused(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama", **(SIZES | {"dtype": torch.float32})))
    layers, _ = compress(model, bits=(4,))
    # an artifact of an earlier version has scales in float32
    layers = [replace(layer, scale=layer.scale.float() * 1.0001) for layer in layers]
    with pytest.raises(ArtifactError, match=r"scales.*float16"):
        GGUF.check(build_content(model, layers, lambda event: None))


def test_groups_of_two_blocks_are_two_blocks(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(tiny_model("llama", **SIZES))
    layers, _ = compress(model, bits=(3,), groups=(64,))
    layers = [x for x in layers if x.spec.shape[1] == 64]
    reader = write_gguf(build_content(model, layers, lambda event: None), tmp_path / "out")
    down = model.module.state_dict()["model.layers.0.mlp.up_proj.weight"].double().numpy()
    assert np.array_equal(read_gguf_weight(reader, "blk.0.ffn_up.weight"), down)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "opt"}, "opt causal-lm.*; allowed: llama causal-lm"),
        ({"hidden_act": "relu"}, "'relu'.*; allowed: silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'.*; allowed: default"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(change: dict[str, Any], words: str) -> None:
    config = {"model_type": "llama", "hidden_act": "silu"} | change
    with pytest.raises(ArtifactError, match=words):
        find_family(config, "causal-lm")


def test_every_family_names_an_architecture_of_the_library() -> None:
    assert all(family.arch in gguf.MODEL_ARCH_NAMES for family in FAMILIES.values())


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2).double() / 128))
    factors = compute_rope_factors(config.to_dict())
    assert factors is not None
    assert torch.allclose(plain / factors.double(), stretched.double(), rtol=1e-5)


def test_a_cut_without_a_name_is_said() -> None:
    events: list[Any] = []
    assert find_pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}}, events.append) == "gpt-2"
    assert (events[0].kind, events[0].subject) == ("warning", "tokenizer")
    digits = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
    }
    assert find_pre_tokenizer({"pre_tokenizer": digits}, events.append) == "smollm"
    assert len(events) == 1


def test_a_dense_model_without_a_tokenizer_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    content = made(tiny_model("llama", **SIZES))[2]
    (tmp_path / "config.json").write_bytes((content.path / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        GGUF.check(replace(content, path=tmp_path))
