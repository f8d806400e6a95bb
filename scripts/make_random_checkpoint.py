#!/usr/bin/env python3
"""Write a checkpoint of a known shape with random weights; see the script beside this file."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from cptq.artifact.weights import write_weights
from cptq.config import parse_size
from cptq.types import TensorSpec

SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1.1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
    ),
    "llama-7b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        },
    ),
    "llama-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
    "qwen-0.5b": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
#: positions of every shape; standard deviation of the matrices
POSITIONS, SPREAD = 2048, 0.02


def build_config(shape: str, blocks: int | None) -> PretrainedConfig:
    """Return the config of a shape, of its first blocks alone where a number is given."""
    family, sizes = SHAPES[shape]
    sizes = {**sizes, "max_position_embeddings": POSITIONS}
    if blocks is not None:
        sizes["num_hidden_layers"] = blocks
    config = AutoConfig.for_model(family, **sizes, bos_token_id=None, eos_token_id=None)
    config.architectures = [type(build_empty(config)).__name__]
    config.dtype = torch.bfloat16
    return config


def build_empty(config: PretrainedConfig) -> Any:
    """Return the model without any weights."""
    with init_empty_weights(include_buffers=True):
        return AutoModelForCausalLM.from_config(config)


def list_tensors(config: PretrainedConfig) -> list[TensorSpec]:
    """Return the tensors of the checkpoint in order, tied ones once."""
    found, seen = [], set()
    for name, parameter in build_empty(config).named_parameters(remove_duplicate=False):
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if id(parameter) not in seen and not tied:
            found.append(TensorSpec(name=name, dtype="BF16", shape=tuple(parameter.shape)))
        seen.add(id(parameter))
    return found


def draw(spec: TensorSpec, seed: int) -> Tensor:
    """Return the values of a tensor: ones for a norm, else normal, by the seed and its name."""
    if len(spec.shape) == 1:
        return torch.full(spec.shape, float(spec.name.endswith("weight")), dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed} {spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(spec.shape, dtype=torch.bfloat16)
    for rows in values.split(max(1, (1 << 24) // spec.shape[1])):
        rows.copy_(torch.randn(rows.shape, generator=generator) * SPREAD)
    return values


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/make_random_checkpoint")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="caller", type=Path, default=Path())
    given = parser.parse_args()
    out = given.caller / given.out
    if out.exists():
        sys.exit(f"{out} is there already; remove it, or name another directory")
    if given.blocks is not None and given.blocks < 1:
        sys.exit(f"--blocks is {given.blocks}; allowed: 1 or more")
    config = build_config(given.shape, given.blocks)
    specs = list_tensors(config)
    total = sum(spec.nbytes for spec in specs)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        sys.exit(f"{out} takes {total:,} bytes, and {free:,} are free")
    tokenizer = (
        AutoTokenizer.from_pretrained(given.caller / given.tokenizer)
        if given.tokenizer
        else build_byte_tokenizer()
    )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        folder = Path(place) / out.name
        folder.mkdir()
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        most = parse_size(given.shard_size, "--shard-size")
        files = write_weights(folder, specs, lambda spec: draw(spec, given.seed), most=most)
        os.replace(folder, out)
    print(f"{out}: {sum(spec.numel for spec in specs):,} weights in {len(files)} files")


if __name__ == "__main__":
    main()
