"""Every text family that transformers can build, with the smallest config that is not degenerate.

The families are read from transformers' auto classes, so that none is forgotten: whatever a newer
version adds appears here by itself. A config has several blocks, grouped heads and odd sizes; its
fields are set by their names (`SIZES`), and where a family needs other values, by `OVERRIDES`.

Left out, by rule: models of images or sound (`is_multimodal`), whose language models have rows of
their own. An encoder-decoder is one row for its encoder where transformers builds that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from cptq.types import ModelKind
from tests.tiny_models import (
    BLOCKS,
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    POSITIONS,
    VOCABULARY,
    Recipe,
    make_random_model,
    tiny_tokenizer,
)

_CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_MASKED = dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_CLASSIFIER = dict(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
_ENCODER = dict(modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)

HEAD_SIZE, BLOCKS_HERE, EXPERTS = 16, BLOCKS + 1, 6

#: name of a config's field -> value, where the family has such a field
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), HIDDEN),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("output_embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "pooler_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "dff"), FEED_FORWARD),
    **dict.fromkeys(("n_inner", "d_inner", "dim_ff", "ffn_hidden_size"), FEED_FORWARD),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size"), FEED_FORWARD),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), FEED_FORWARD),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS_HERE),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), BLOCKS_HERE),
    **dict.fromkeys(("num_encoder_layers", "num_blocks"), BLOCKS_HERE),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "dim_head"), HEAD_SIZE),
    **dict.fromkeys(("attention_head_size", "attention_head_dim", "v_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("qk_head_dim",), 24),
    **dict.fromkeys(("qk_nope_head_dim",), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("n_ctx", "context_length", "original_max_position_embeddings"), POSITIONS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts",), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "local_attention"), 64),
    **dict.fromkeys(("linear_num_key_heads",), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 3),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 6),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 32),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk",), 16),
    "query_pre_attn_scalar": HEAD_SIZE,
    "n_langs": 1,
    "dim_model_base": HIDDEN,
}

#: of families whose queries and keys are of low rank (DeepSeek's): every head has its own keys
LOW_RANK: Mapping[str, Any] = {"num_key_value_heads": HEADS, "head_dim": 8}

#: family -> fields that replace those of `SIZES`; None leaves the field to the family
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    **{
        family: {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        for family in (
            "qwen3_next",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "kimi_linear",
            "granitemoehybrid",
        )
    },
    "bailing_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_expert_group": 1,
    },
    "bamba": {"attn_layer_indices": [1]},
    "canine": {"num_hash_buckets": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "codegen": {"n_head": 4, "n_embd": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 96},
    # halves its sequence between groups of blocks
    "funnel": {"block_sizes": [2, 1, 1], "block_repeats": [1, 1, 1], "num_decoder_layers": 1},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
        "intermediate_size": [FEED_FORWARD] * 6,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4_text": {"global_head_dim": HEAD_SIZE, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": HIDDEN},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8},
    "mimo_v2_flash": {"head_dim": 24, "num_attention_heads": 4},
    "mobilebert": {
        "hidden_size": 64,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
        "num_attention_heads": 4,
        "embedding_size": 32,
    },
    "perceiver": {"d_latents": HIDDEN, "num_latents": 16, "num_self_attends_per_block": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_SIZE,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 32], "axial_pos_shape": [16, 16]},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xlm": {"emb_dim": 64, "n_heads": 4, "n_layers": 3},
    "flaubert": {"emb_dim": 64, "n_heads": 4, "n_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "qk_dim_factor": 1.0},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 6,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_SIZE,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_SIZE,
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 6,
    },
    "zaya": {"num_experts_per_tok": 1},
}

#: families that transformers cannot build from any small config here -> why
UNBUILT: Mapping[str, str] = {
    "t5gemma": "transformers has no auto class for its encoder alone",
    "t5gemma2": "transformers has no auto class for its encoder alone",
    "layoutlmv2": "needs detectron2",
}


def list_families() -> Iterator[str]:
    """Yield the `model_type` of every text family."""
    for name in sorted({*_CAUSAL, *_MASKED, *_CLASSIFIER, *_ENCODER}):
        if not is_multimodal(name):
            yield name


def is_multimodal(family: str) -> bool:
    """Whether a family is a shell around a language model, or takes images or sound."""
    if family == "gemma4_assistant":  # has no default config; it drafts for another model
        return True
    parts = " ".join(AutoConfig.for_model(family).sub_configs)
    return any(part in parts for part in ("vision", "audio", "text_config", "vq", "encoder_config"))


def choose_kind(family: str) -> ModelKind:
    """Return what a family is walked as: what it is mostly trained for."""
    if family in _ENCODER and family not in _CAUSAL and family not in _MASKED:
        return "encoder"
    if family in _CAUSAL and family not in _MASKED:
        return "causal-lm"
    return "classifier" if family in _CLASSIFIER else "masked-lm"


def choose_auto_class(family: str) -> Any:
    """Return the auto class that builds it."""
    names = {
        "causal-lm": "CausalLM",
        "masked-lm": "MaskedLM",
        "classifier": "SequenceClassification",
        "encoder": "TextEncoding",
    }
    return getattr(transformers, f"AutoModelFor{names[choose_kind(family)]}")


def make_config(family: str) -> PretrainedConfig:
    """Return the small config of a family."""
    given = OVERRIDES.get(family, {})
    known = vars(AutoConfig.for_model(family))
    fields = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        fields |= {name: value for name, value in LOW_RANK.items() if name in known}
    fields |= given
    return AutoConfig.for_model(family, **{n: v for n, v in fields.items() if v is not None})


def build_family(path: Path, family: str, seed: int = 0) -> Path:
    """Write a random checkpoint of a family and its tokenizer to `path`; returns `path`."""
    recipe = Recipe(family, choose_auto_class(family), {})
    model = make_random_model(recipe, make_config(family), seed)
    model.save_pretrained(path)
    tiny_tokenizer(causal=choose_kind(family) == "causal-lm").save_pretrained(path)
    return path
