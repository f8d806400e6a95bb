"""Random checkpoints of a few thousand weights, one per architecture, with a tokenizer.

Sizes are odd on purpose: a hidden width of 48 divides by no usual group size, 80 only by 16, the
vocabulary is no power of two, keys and values have fewer heads than queries. Biases and norms are
random as well, so that a test notices when one is forgotten. Same arguments, same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

HIDDEN, FEED_FORWARD, HEADS, BLOCKS, VOCABULARY, POSITIONS = 48, 80, 3, 2, 300, 256
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")

#: what the tokenizer is trained on; handy as calibration text too
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the small cat sleeps in the warm sun.",
    "A model is a function of its weights, and most of the weights matter less than the others.",
    "Once upon a time there was a little girl who lived near the forest with her mother.",
    "It is a charming and often affecting journey, but the film is too long for its own good.",
    "Numbers such as 3, 14 and 2026 are split into bytes; so is every other sign: (a + b) / c.",
)

_COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": POSITIONS,
}
_LLAMA_LIKE = _COMMON | {"num_key_value_heads": 1, "head_dim": 16}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Recipe:
    """How one architecture is made: its transformers name, its auto class, its sizes."""

    model_type: str
    auto: Any
    config: Mapping[str, Any]


RECIPES: Mapping[str, Recipe] = {
    "llama": Recipe("llama", AutoModelForCausalLM, _LLAMA_LIKE),
    "mistral": Recipe("mistral", AutoModelForCausalLM, _LLAMA_LIKE),
    "qwen2": Recipe("qwen2", AutoModelForCausalLM, _COMMON | {"num_key_value_heads": 1}),
    "qwen3": Recipe("qwen3", AutoModelForCausalLM, _LLAMA_LIKE),
    "qwen3_moe": Recipe("qwen3_moe", AutoModelForCausalLM, _LLAMA_LIKE | _EXPERTS),
    "qwen2_moe": Recipe(
        "qwen2_moe",
        AutoModelForCausalLM,
        _LLAMA_LIKE | _EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "olmoe": Recipe(
        "olmoe",
        AutoModelForCausalLM,
        _LLAMA_LIKE | {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "opt": Recipe(
        "opt",
        AutoModelForCausalLM,
        _COMMON | {"ffn_dim": FEED_FORWARD, "word_embed_proj_dim": HIDDEN},
    ),
    "gpt2": Recipe(
        "gpt2",
        AutoModelForCausalLM,
        {
            "n_embd": HIDDEN,
            "n_inner": FEED_FORWARD,
            "n_head": HEADS,
            "n_layer": BLOCKS,
            "n_positions": POSITIONS,
        },
    ),
    "gpt_neox": Recipe("gpt_neox", AutoModelForCausalLM, _COMMON),
    "bert": Recipe("bert", AutoModelForSequenceClassification, _COMMON | {"num_labels": 2}),
    "bert-encoder": Recipe("bert", AutoModel, _COMMON),
    "bert-mlm": Recipe("bert", AutoModelForMaskedLM, _COMMON),
    "distilbert": Recipe(
        "distilbert",
        AutoModelForSequenceClassification,
        {
            "dim": HIDDEN,
            "hidden_dim": FEED_FORWARD,
            "n_heads": HEADS,
            "n_layers": BLOCKS,
            "max_position_embeddings": POSITIONS,
            "num_labels": 2,
        },
    ),
    "roberta": Recipe(
        "roberta",
        AutoModelForSequenceClassification,
        _COMMON | {"num_labels": 2, "type_vocab_size": 1},
    ),
    "mpnet": Recipe("mpnet", AutoModel, _COMMON),
    # A family that cptq has no description of: the generic walk over nn.Linear must do.
    "generic": Recipe("phi", AutoModelForCausalLM, _COMMON),
}
CAUSAL_ARCHITECTURES = tuple(n for n, r in RECIPES.items() if r.auto is AutoModelForCausalLM)
#: one of each build: rotary, learned positions, Conv1D, parallel, encoder, relative, experts
VARIED = ("llama", "opt", "gpt2", "gpt_neox", "bert-mlm", "mpnet", "qwen3_moe")
#: those that run in float64; transformers' experts do not
EXACT_ARCHITECTURES = tuple(
    n for n in CAUSAL_ARCHITECTURES if "num_experts" not in RECIPES[n].config
)


def build_tiny_model(
    path: Path,
    arch: str,
    *,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random checkpoint and its tokenizer to `path`; returns `path`.

    Args:
        path: the directory to write.
        arch: a key of `RECIPES`.
        tied: whether input and output embeddings share a tensor; None: the family's habit.
        dtype: storage type of the weights.
        shards: split the weights over several files with an index.
        seed: of every random number.
        config: fields of the transformers config that replace the recipe's.
    """
    recipe = RECIPES[arch]
    causal = recipe.auto is AutoModelForCausalLM
    fields = _token_ids(causal) | dict(recipe.config) | config
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    model = make_random_model(recipe, AutoConfig.for_model(recipe.model_type, **fields), seed)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB" if shards else "1GB")
    tiny_tokenizer(causal=causal).save_pretrained(path)
    return path


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer`, which also marks the second sentence of a pair, as BERT's does."""
    tokenizer = tiny_tokenizer(causal=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def write_rte(folder: Path, count: int) -> Path:
    """Write RTE's training part under a data folder: two sentences a row, none like another."""
    (folder / "glue" / "RTE").mkdir(parents=True)
    lines = [f"{i}\tleft {SENTENCES[i % 5]} {i}\tright {i}.\tentailment" for i in range(count)]
    table = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines])
    (folder / "glue" / "RTE" / "train.tsv").write_text(table)
    return folder


def tiny_tokenizer(*, causal: bool, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; `<s> ... </s>` around a text unless `causal`.

    `bos`: a causal one puts `<s>` before a text, as Llama's and Gemma's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if not causal:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    elif bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    pad, first, last, unk, mask = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS - 8,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=pad,
        bos_token=first,
        eos_token=last,
        unk_token=unk,
        **({} if causal else {"cls_token": first, "sep_token": last, "mask_token": mask}),
    )


def _token_ids(causal: bool) -> dict[str, Any]:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": VOCABULARY} | (special if causal else {"pad_token_id": 0})


def make_random_model(recipe: Recipe, config: Any, seed: int) -> nn.Module:
    """A model whose weights, biases and norms are all random, and drawn from `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                _randomize(parameter)
    return model.eval()


def _randomize(parameter: nn.Parameter) -> None:
    """Matrices ~ N(0, 1 / in_features); vectors keep their mean (norms 1, biases 0) +- 0.1."""
    noise = torch.randn_like(parameter)
    if parameter.ndim < 2:
        parameter.add_(0.1 * noise)
    else:
        parameter.copy_(noise / parameter.shape[-1] ** 0.5)
