"""Named families have roles and fused groups; experts are split where their names allow it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from cptq.errors import ModelError
from tests.conftest import Heard
from tests.families import build_family
from tests.tiny_models import VOCABULARY

_LLAMA = ("qkv", "o", "gate_up", "down")
_BERT = ("qkv", "o", "fc1", "fc2")
_EXPERTS = ("gate_up", "down") * 6
_LOW_RANK = ("qkv_a", "q_b", "kv_b", "o")
#: roles of the units of block 1, in forward order
ROLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite"), _LLAMA),
    **dict.fromkeys(("cohere2", "stablelm", "smollm3", "phi3", "glm"), _LLAMA),
    **dict.fromkeys(("starcoder2", "bloom", "mpt", "gptj"), _BERT),
    **dict.fromkeys(("electra", "xlm-roberta", "esm"), _BERT),
    "mixtral": ("qkv", "o", *_EXPERTS),
    # routed experts come in one stack
    **dict.fromkeys(("gpt_oss", "granitemoe"), ("qkv", "o")),
    "llama4_text": _LLAMA,
    "qwen3_next": ("qkv", "o", *_LLAMA[2:], "shared_expert_gate", *_EXPERTS),
    "deepseek_v2": (*_LOW_RANK, *_EXPERTS, *_LLAMA[2:]),
    "deepseek_v3": (*_LOW_RANK, *_EXPERTS, *_LLAMA[2:]),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ROLES)
def test_roles_of_a_block(tmp_path: Path, heard: Heard, family: str) -> None:
    path = build_family(tmp_path / family, family)
    model = load_model(ModelSettings(model=str(path)), heard, experts=True)
    assert model.family == family
    found = [unit.role for unit in model.units if unit.block == 1]
    assert sorted(found) == sorted(ROLES[family])


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path, heard: Heard) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration, an encoder-decoder"):
        load_model(ModelSettings(model=str(tmp_path)), heard)
