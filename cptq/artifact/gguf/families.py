"""Model families as llama.cpp implements them: names of sizes and tensors, row order, differences.

Tensor names come from the gguf package's own table. In addition:

- Llama and Mistral: transformers rotates the first half of a head against the second, llama.cpp's
  `llama` rotates neighbours. The rows of q and k are therefore interleaved within each head:
  new row (h, 2i + p) is old row (h, p * d/2 + i). Rows are moved whole, codes and scales alike.
- GPT-2: a Conv1D is stored transposed, (in, out), and llama.cpp needs (out, in).
- BERT: llama.cpp's encoder has no pooler and only the first token type. A classifier's pooler and
  head exist under other names as its "rank" head, out(tanh(dense(state of the first token))), whose
  outputs are the logits.
- Llama 3's scaled rotary embedding is a tensor of factors, one per frequency.

llama.cpp computes some activations by its own formula (GELU by tanh, from a float16 table).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from cptq.errors import ArtifactError
from cptq.types import Emit, ModelKind, Notice

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    `sizes` writes its hyperparameters and `activations` lists those that it implements. With
    `rotates_pairs`, rows of q and k are interleaved. `prefix` is removed from tensor names before
    they are looked up; `renamed` maps modules to their names in the table. Tensors whose names end
    in `left_out` are not written, and matrices whose names end in `always_f32` are float32.
    `blind_to_pairs`: there is only one token type.
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

    def build_name_map(self, blocks: int) -> gguf.TensorNameMap:
        """Return the gguf package's table of tensor names."""
        return gguf.get_tensor_name_map(self.arch, blocks)

    def translate_name(self, tensor: str) -> str:
        """Return a tensor's name in that table."""
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


#: {(model_type of config.json, kind of model): family}
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
    """Return the family of a config.json.

    Raises:
        ArtifactError: the family is not supported, or llama.cpp computes it differently.
    """
    name = str(config.get("model_type"))
    family = FAMILIES.get((name, kind))
    if family is None:
        raise ArtifactError(
            f"a {name} {kind} cannot be exported to GGUF",
            allowed=", ".join(" ".join(known) for known in FAMILIES),
        )
    _refuse_variants(name, config, family)
    return family


def _refuse_variants(name: str, config: Config, family: Family) -> None:
    act = config.get("hidden_act", config.get("activation_function", family.activations[0]))
    if act not in family.activations:
        raise ArtifactError(
            f"llama.cpp does not implement the activation {act!r} in a {name} model",
            allowed=", ".join(family.activations),
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ArtifactError(f"llama.cpp implements only absolute positions in a {name} model")
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise ArtifactError("llama.cpp does not scale attention by layer number")
    kind = read_rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ArtifactError(
            f"rotary scaling of type {kind!r} cannot be exported", allowed="default, linear, llama3"
        )


def read_rope(config: Config) -> dict[str, Any]:
    """Read the rotary settings, as written by transformers 5 or by earlier versions."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found["rope_type"] = str(found.get("rope_type", found.get("type", "default")))
    return found


def order_rows(family: Family, config: Config, name: str) -> Tensor | None:
    """Return the old row of each new row of a tensor; None if the order stays."""
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
    """Compute the divisors of the rotary frequencies (Llama 3.1's published scheme), or None."""
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


def report_differences(tensors: Sequence[str], family: Family, config: Config, emit: Emit) -> None:
    """Emit notices on what llama.cpp computes differently from transformers for this model."""
    _report_left_out(tensors, family, emit)
    _report_window(config, emit)
    if family.blind_to_pairs:
        message = (
            "llama.cpp gives every token the first token type: outputs for pairs of texts differ "
            "from those of transformers"
        )
        emit(Notice(kind="warning", subject="token types", message=message))


def _report_left_out(tensors: Sequence[str], family: Family, emit: Emit) -> None:
    names = [name for name in tensors if name.endswith(family.left_out)]
    if family.left_out and names:
        message = f"{len(names)} tensors do not exist in llama.cpp's encoder and are omitted"
        emit(Notice(kind="skipped", subject=names[0], message=message))


def _report_window(config: Config, emit: Emit) -> None:
    window = config.get("sliding_window")
    if (
        window
        and config.get("use_sliding_window", True)
        and window < config["max_position_embeddings"]
    ):
        message = (
            f"the model attends to the last {window} tokens, llama.cpp to all: outputs differ for "
            "longer texts"
        )
        emit(Notice(kind="warning", subject="sliding_window", message=message))
