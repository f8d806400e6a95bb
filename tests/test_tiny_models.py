"""The random checkpoints themselves: they load, use every weight and are reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.conftest import TinyModel
from tests.tiny_models import CAUSAL_ARCHITECTURES, RECIPES, SENTENCES, VOCABULARY, build_tiny_model


def _load(path: Path, arch: str) -> torch.nn.Module:
    model, info = RECIPES[arch].auto.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("arch", RECIPES)
def test_a_checkpoint_loads_and_uses_every_weight(tiny_model: TinyModel, arch: str) -> None:
    path = tiny_model(arch)
    encoded = AutoTokenizer.from_pretrained(path)(
        list(SENTENCES), return_tensors="pt", padding=True
    )
    assert int(encoded["input_ids"].max()) < VOCABULARY
    model = _load(path, arch)
    outputs = [part for part in model(**encoded).values() if torch.is_tensor(part)]
    assert all(output.isfinite().all() and output.std() > 0.05 for output in outputs)
    sum(output.square().mean() for output in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_tokenizer_survives_the_round_trip(tiny_model: TinyModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in SENTENCES] == list(SENTENCES)


def test_encoders_wrap_a_sentence_and_causal_models_do_not(tiny_model: TinyModel) -> None:
    wrapped = AutoTokenizer.from_pretrained(tiny_model("bert"))("a fox").input_ids
    bare = AutoTokenizer.from_pretrained(tiny_model("llama"))("a fox").input_ids
    assert wrapped == [1, *bare, 2]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", CAUSAL_ARCHITECTURES)
def test_embeddings_are_tied_when_asked(tiny_model: TinyModel, arch: str, tied: bool) -> None:
    model = _load(tiny_model(arch, tied=tied), arch)
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied


def test_shards_have_an_index_and_the_same_weights(tiny_model: TinyModel) -> None:
    whole, parts = tiny_model("llama"), tiny_model("llama", shards=True)
    assert (parts / "model.safetensors.index.json").is_file()
    merged = {
        k: v for file in sorted(parts.glob("*.safetensors")) for k, v in load_file(file).items()
    }
    expected = load_file(whole / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two, other = (
        build_tiny_model(tmp_path / name, "opt", seed=seed) / "model.safetensors"
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()
