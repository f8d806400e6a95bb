"""Where a checkpoint gives two answers, stock transformers' is taken, and it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from tests.conftest import Heard, TinyModel
from tests.unit.checkpoint.made import copied, edit_config, edit_weights

STALE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_stale_copy_in_another_shard(
    place: int, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama", shards=True), tmp_path / "model")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    own, other = index[f"{STALE}.weight"], sorted(set(index.values()))[place]
    tensors = load_file(path / other)
    tensors[f"{STALE}.weight"] = torch.zeros(80, 48)
    save_file(tensors, path / other, metadata={"format": "pt"})
    model = load_model(ModelSettings(model=str(path), device="cpu"), heard)
    stock = AutoModelForCausalLM.from_pretrained(path).get_submodule(STALE)
    assert torch.equal(model.linear(STALE).weight, stock.weight)  # type: ignore[arg-type]
    (told,) = [notice for notice in heard.notices if "the copy in" in notice]
    assert f"is in {' and '.join(sorted([own, other]))}" in told
    assert f"the copy in {max(own, other)} is taken" in told
    assert bool(stock.weight.any()) is (max(own, other) == own)


@pytest.mark.parametrize("same", [False, True])
def test_a_config_that_ties_two_matrices(
    same: bool, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(tie_word_embeddings=True))
    if same:
        embedding = "model.embed_tokens.weight"
        edit_weights(path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = load_model(ModelSettings(model=str(path), device="cpu"), heard)
    stock = AutoModelForCausalLM.from_pretrained(path)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is same
    assert torch.equal(model.linear("lm_head").weight, stock.lm_head.weight)  # type: ignore[arg-type]
    assert len(model.vocabulary) == (1 if same else 2)
    assert any("two different matrices" in notice for notice in heard.notices) is not same
