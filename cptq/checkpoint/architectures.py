"""Describe model families: where the blocks are, which role a layer has, which layers are fused.

One value per family. A layer's role and fused group come from the end of its name; everything
else (order, shapes, ties) is observed on the model itself. A family that is not listed gets
`GENERIC`: blocks are the `ModuleList` that holds most weights, the role is the last part of the
name, and linears of one parent module that receive the very same input form a fused group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models.

    `roles`: end of a linear's name inside its block -> role. `fused`: sets of roles that one
    decision covers, because runtimes fuse them into one matrix -> name of the group.
    """

    family: str
    blocks: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def get_role(self, name: str) -> str:
        """Return the role of a linear inside a block, by the longest matching end of its name."""
        ends = [end for end in self.roles if name == end or name.endswith(f".{end}")]
        return self.roles[max(ends, key=len)] if ends else name.rsplit(".", 1)[-1]

    def get_group(self, role: str) -> str | None:
        """Return the fused group that a role belongs to, or None."""
        return next((group for group, roles in self.fused.items() if role in roles), None)


QKV = {"qkv": ("q", "k", "v")}
QKV_GATE_UP = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

_LLAMA_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_JOINED_ROLES = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
_BERT_ROLES = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
}


#: q, k and v are apart, gate and up joined
_GATED_JOINED_ROLES = _LLAMA_ROLES | {"gate_up_proj": "gate_up"}
#: `model_type`s whose blocks have the names of Llama's and of BERT's
_LLAMA_LIKE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "cohere",
    "cohere2",
    "stablelm",
    "smollm3",
    "llama4_text",
    "qwen3_next",
    "gpt_oss",
    "granitemoe",
)
#: Mixtral's names of an expert's linears
_MIXTRAL_ROLES = _LLAMA_ROLES | {"w1": "gate", "w3": "up", "w2": "down"}
_BERT_LIKE = ("electra", "xlm-roberta", "esm")


def _make_llama_like(family: str) -> Architecture:
    return Architecture(family=family, blocks="model.layers", roles=_LLAMA_ROLES, fused=QKV_GATE_UP)


def _make_bert_like(family: str) -> Architecture:
    return Architecture(family=family, blocks="encoder.layer", roles=_BERT_ROLES, fused=QKV)


def _make_low_rank(family: str) -> Architecture:
    """DeepSeek's attention: queries, and keys with values, go through a narrow layer each."""
    roles = {"q_a_proj": "q_a", "q_b_proj": "q_b", "kv_b_proj": "kv_b"}
    return Architecture(
        family=family,
        blocks="model.layers",
        roles=_LLAMA_ROLES | roles | {"kv_a_proj_with_mqa": "kv_a"},
        fused={"qkv_a": ("q_a", "kv_a"), "gate_up": ("gate", "up")},
    )


def _make_joined(family: str, blocks: str, roles: Mapping[str, str]) -> Architecture:
    """Make a family whose q, k and v are one matrix already, so that nothing is left to fuse."""
    return Architecture(family=family, blocks=blocks, roles=roles)


GENERIC = Architecture(family="generic")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _make_llama_like("llama"),
    "mistral": _make_llama_like("mistral"),
    "qwen2": _make_llama_like("qwen2"),
    "qwen3": _make_llama_like("qwen3"),
    "qwen2_moe": _make_llama_like("qwen2_moe"),
    "qwen3_moe": _make_llama_like("qwen3_moe"),
    "olmoe": _make_llama_like("olmoe"),
    **{name: _make_llama_like(name) for name in _LLAMA_LIKE},
    **{name: _make_bert_like(name) for name in _BERT_LIKE},
    "mixtral": Architecture(
        family="mixtral", blocks="model.layers", roles=_MIXTRAL_ROLES, fused=QKV_GATE_UP
    ),
    "phi3": _make_joined("phi3", "model.layers", _JOINED_ROLES),
    "glm": Architecture(family="glm", blocks="model.layers", roles=_GATED_JOINED_ROLES, fused=QKV),
    "starcoder2": Architecture(
        family="starcoder2",
        blocks="model.layers",
        roles=_LLAMA_ROLES | {"mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
        fused=QKV,
    ),
    "deepseek_v2": _make_low_rank("deepseek_v2"),
    "deepseek_v3": _make_low_rank("deepseek_v3"),
    "bloom": _make_joined(
        "bloom",
        "transformer.h",
        {"query_key_value": "qkv", "self_attention.dense": "o"}
        | {"dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2"},
    ),
    "mpt": _make_joined(
        "mpt",
        "transformer.blocks",
        {"Wqkv": "qkv", "attn.out_proj": "o", "ffn.up_proj": "fc1", "ffn.down_proj": "fc2"},
    ),
    "gptj": Architecture(
        family="gptj",
        blocks="transformer.h",
        roles={"q_proj": "q", "k_proj": "k", "v_proj": "v", "attn.out_proj": "o"}
        | {"mlp.fc_in": "fc1", "mlp.fc_out": "fc2"},
        fused=QKV,
    ),
    "opt": Architecture(
        family="opt",
        blocks="decoder.layers",
        roles={"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
        | {"fc1": "fc1", "fc2": "fc2"},
        fused=QKV,
    ),
    "gpt2": Architecture(
        family="gpt2",
        blocks="transformer.h",
        roles={"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
    ),
    "gpt_neox": Architecture(
        family="gpt_neox",
        blocks="gpt_neox.layers",
        roles={"query_key_value": "qkv", "attention.dense": "o"}
        | {"dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2"},
    ),
    "bert": _make_bert_like("bert"),
    "roberta": _make_bert_like("roberta"),
    "distilbert": Architecture(
        family="distilbert",
        blocks="transformer.layer",
        roles={"q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o"}
        | {"lin1": "fc1", "lin2": "fc2"},
        fused=QKV,
    ),
    "mpnet": Architecture(
        family="mpnet",
        blocks="encoder.layer",
        roles={"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.o": "o"}
        | {"intermediate.dense": "fc1", "output.dense": "fc2"},
        fused=QKV,
    ),
}


def get_architecture(model_type: str) -> Architecture:
    """Return the family of a `config.model_type`, or `GENERIC`."""
    return ARCHITECTURES.get(model_type, GENERIC)
