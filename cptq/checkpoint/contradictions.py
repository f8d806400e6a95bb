"""Say which of two answers is taken where a checkpoint gives two.

Stock transformers chooses silently. cptq loads with it and follows it, so that what is compressed
is what everyone runs; here it is told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cptq.checkpoint.files import read_header
from cptq.types import Emit, Notice


def report_stale_copies(files: list[Path], emit: Emit) -> None:
    """Warn of tensors that several shards hold: transformers takes the last shard by name.

    The index is not asked; it may name another one.
    """
    if len(files) < 2:
        return
    holders: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: file.name):
        if file.suffix == ".safetensors":
            for name in read_header(file):
                holders.setdefault(name, []).append(file.name)
    twice = {name: found for name, found in holders.items() if len(found) > 1}
    for name, found in list(twice.items())[:1]:
        more = f" (and {len(twice) - 1} more tensors are)" if len(twice) > 1 else ""
        message = (
            f"is in {' and '.join(found)}{more}; the copy in {found[-1]} is taken, as stock "
            "transformers takes it, whatever the index says"
        )
        emit(Notice(kind="warning", subject=name, message=message))


def report_untied_head(module: nn.Module, config: Any, emit: Emit) -> None:
    """Warn where the config ties head and embedding and the checkpoint holds two matrices."""
    ends = [getattr(module, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    tied = config.get("tie_word_embeddings")
    if tied is True and None not in weights and weights[0] is not weights[1]:
        message = (
            "config.json ties the output head to the embedding, and the checkpoint holds two "
            "different matrices; both are kept, as stock transformers keeps them"
        )
        emit(Notice(kind="warning", subject="tie_word_embeddings", message=message))
