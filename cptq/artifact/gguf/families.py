"""Families of models as llama.cpp knows them: its names for sizes and tensors, its order of rows.

Tensor names come from the gguf package's own table. What that table does not say:

- Llama and Mistral: transformers rotates the first half of a head against the second, llama.cpp's
  `llama` rotates neighbours. So the rows of q and k are interleaved, head by head:
  new row (h, 2i + p) is old row (h, p * d/2 + i). Rows are moved whole, codes and scales alike.
- GPT-2: a Conv1D lies transposed, (in, out), and llama.cpp wants (out, in).
- BERT: the pooler and the token types beyond the first have no part in llama.cpp's encoder. A
  classifier's pooler and head do, under other names: they are its "rank" head,
  out(tanh(dense(state of the first token))), whose outputs are the logits.
- Llama 3's stretched rotation is a tensor of factors, one per frequency.

llama.cpp computes some activations by a formula of its own (GELU by tanh, looked up in float16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from cptq.errors import ArtifactError
from cptq.types import ModelKind

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    `activations` are those that it computes; `rotates_pairs` asks for interleaved q and k rows,
    `prefix` is dropped from tensor names before they are looked up and `renamed` are those that the
    table knows otherwise, `left_out` are ends of names that have no place; `always_f32` ends of
    names of matrices that it wants in float32; `blind_to_pairs`: it has one token type.
    """

    arch: Any
    sizes: Callable[[gguf.GGUFWriter, Config], None]
    activations: tuple[str, ...]
    rotates_pairs: bool = False
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    always_f32: tuple[str, ...] = ()
    blind_to_pairs: bool = False

    def names(self, blocks: int) -> gguf.TensorNameMap:
        """The gguf package's table of names."""
        return gguf.get_tensor_name_map(self.arch, blocks)

    def known_name(self, tensor: str) -> str:
        """A tensor's name as that table has it."""
        module, _, part = tensor.removeprefix(self.prefix).rpartition(".")
        return f"{self.renamed.get(module, module)}.{part}"


def _write_decoder_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    _write_common_sizes(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = read_rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_common_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])


def _write_gpt2_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    width = config["n_embd"]
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * width)
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_bert_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_common_sizes(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_token_type_count(config.get("type_vocab_size", 1))


def _write_encoder_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_bert_sizes(writer, config)
    writer.add_pooling_type(gguf.PoolingType.NONE)


def _write_classifier_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_bert_sizes(writer, config)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    labels = {int(number): str(label) for number, label in config["id2label"].items()}
    writer.add_classifier_output_labels([labels[number] for number in sorted(labels)])


def _make_decoder(arch: Any, **more: Any) -> Family:
    return Family(arch=arch, sizes=_write_decoder_sizes, activations=("silu", "swish"), **more)


def _make_bert(**more: Any) -> Family:
    return Family(
        arch=gguf.MODEL_ARCH.BERT,
        activations=("gelu", "gelu_new", "gelu_pytorch_tanh"),
        prefix="bert.",
        always_f32=("position_embeddings.weight", "token_type_embeddings.weight"),
        **more,
    )


#: (model_type of config.json, kind of model)
FAMILIES: Mapping[tuple[str, ModelKind], Family] = {
    ("llama", "causal-lm"): _make_decoder(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True),
    ("mistral", "causal-lm"): _make_decoder(gguf.MODEL_ARCH.LLAMA, rotates_pairs=True),
    ("qwen2", "causal-lm"): _make_decoder(gguf.MODEL_ARCH.QWEN2),
    ("qwen3", "causal-lm"): _make_decoder(gguf.MODEL_ARCH.QWEN3),
    ("gpt2", "causal-lm"): Family(
        arch=gguf.MODEL_ARCH.GPT2,
        sizes=_write_gpt2_sizes,
        activations=("gelu_new", "gelu", "gelu_pytorch_tanh"),
        left_out=(".attn.bias", ".attn.masked_bias"),
        always_f32=("wpe.weight",),
    ),
    ("bert", "encoder"): _make_bert(
        sizes=_write_encoder_sizes,
        left_out=("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"),
    ),
    ("bert", "classifier"): _make_bert(
        sizes=_write_classifier_sizes,
        renamed={"pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
        left_out=("embeddings.position_ids",),
        blind_to_pairs=True,
    ),
}


def find_family(config: Config, kind: ModelKind) -> Family:
    """The family of a config.json.

    Raises:
        ArtifactError: llama.cpp's version of it is not known here, or computes something else.
    """
    name = str(config.get("model_type"))
    family = FAMILIES.get((name, kind))
    if family is None:
        raise ArtifactError(
            f"a {name} {kind} has no GGUF here, as none is known that llama.cpp computes likewise",
            allowed=", ".join(" ".join(known) for known in FAMILIES),
        )
    _refuse_variants(name, config, family)
    return family


def _refuse_variants(name: str, config: Config, family: Family) -> None:
    act = config.get("hidden_act", config.get("activation_function", family.activations[0]))
    if act not in family.activations:
        raise ArtifactError(
            f"llama.cpp does not compute {act!r} in a {name} model",
            allowed=", ".join(family.activations),
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ArtifactError(f"llama.cpp knows absolute positions alone in a {name} model")
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise ArtifactError("llama.cpp does not scale attention by the number of the layer")
    kind = read_rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ArtifactError(
            f"positions stretched by {kind!r} are not exported", allowed="default, linear, llama3"
        )


def read_rope(config: Config) -> dict[str, Any]:
    """Rotary settings, as transformers 5 and as earlier versions write them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found["rope_type"] = str(found.get("rope_type", found.get("type", "default")))
    return found


def order_rows(family: Family, config: Config, name: str) -> Tensor | None:
    """Which old row each new row of a tensor is; None where none moves."""
    if not family.rotates_pairs:
        return None
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return torch.arange(heads * head).view(heads, 2, head // 2).transpose(1, 2).reshape(-1)


def compute_rope_factors(config: Config) -> Tensor | None:
    """What Llama 3 divides each rotary frequency by (Llama 3.1's published scheme), or None."""
    rope = read_rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = (
        float(rope[f"{n}"]) for n in ("low_freq_factor", "high_freq_factor", "factor")
    )
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        turns = context / (2 * math.pi * float(rope["rope_theta"]) ** (i / head))
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / (share + (1.0 - share) / factor))
    return torch.tensor(factors, dtype=torch.float32)
