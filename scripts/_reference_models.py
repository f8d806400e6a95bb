"""What `scripts/train_reference_lm` trains: the sizes and families, the text, its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from cptq.data.files import read_text
from cptq.errors import CptqError

HELD_OUT = 0.05
SPECIALS = ("<pad>", "</s>")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large, and how it is trained."""

    vocabulary: int
    width: int
    blocks: int
    heads: int
    context: int
    batch: int
    rate: float


SIZES = {
    "small": Size(vocabulary=1024, width=128, blocks=4, heads=4, context=128, batch=8, rate=3e-3),
    "medium": Size(vocabulary=4096, width=256, blocks=6, heads=8, context=256, batch=4, rate=2e-3),
    "large": Size(vocabulary=8192, width=512, blocks=8, heads=8, context=512, batch=64, rate=1e-3),
}


def config(arch: str, size: Size) -> Any:
    """The configuration of a family at a size; dropout off, since minutes overfit nothing."""
    own: dict[str, dict[str, Any]] = {
        "opt": {
            "ffn_dim": 4 * size.width,
            "word_embed_proj_dim": size.width,
            "dropout": 0.0,
            **_common(size),
        },
        "gpt2": {
            "n_embd": size.width,
            "n_layer": size.blocks,
            "n_head": size.heads,
            "n_positions": size.context,
            **{f"{name}_pdrop": 0.0 for name in ("attn", "embd", "resid")},
        },
        "llama": {
            "intermediate_size": 8 * size.width // 3 // 64 * 64,
            "num_key_value_heads": size.heads // 2,
            "tie_word_embeddings": True,
            **_common(size),
        },
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return AutoConfig.for_model(arch, vocab_size=size.vocabulary, **ids, **own[arch])


def _common(size: Size) -> dict[str, int]:
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.context,
    }


def split(text: str) -> tuple[str, str]:
    """(training part, held-out part): the last HELD_OUT, cut at a line's end."""
    cut = text.find("\n", int(len(text) * (1 - HELD_OUT))) + 1
    return (text[:cut], text[cut:]) if 0 < cut < len(text) else (text, "")


def train_tokenizer(text: str, size: Size) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the size's vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    pad, end = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=end,
        eos_token=end,
        model_max_length=size.context,
    )


def encode(tokenizer: Any, text: str) -> Tensor:
    """(tokens,) int64."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def read_files(paths: Sequence[Path], context: int) -> tuple[str, str, list[dict[str, Any]]]:
    """(training text, held-out text, a record of every file).

    Raises:
        CptqError: a file cannot be read, is empty or not UTF-8, or there is too little text.
    """
    texts = [read_text(path) for path in paths]
    parts = [split(text) for text in texts]
    records = [
        {
            "name": path.name,
            "bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        for path, text in zip(paths, texts, strict=True)
    ]
    training, held = ("\n".join(part[side] for part in parts) for side in (0, 1))
    if len(held) < 20 * context:
        raise CptqError(
            f"{sum(map(len, texts)):,} characters of text are too few to train on and hold out",
            allowed=f"at least {int(20 * context / HELD_OUT):,}",
        )
    return training, held, records
