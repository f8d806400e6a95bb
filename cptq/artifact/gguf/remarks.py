"""What llama.cpp computes otherwise than transformers, so that a user hears of it at export."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.artifact.gguf.families import Config, Family
from cptq.types import Emit, Notice


def report_differences(tensors: Sequence[str], family: Family, config: Config, emit: Emit) -> None:
    """Notices about a model with these tensors and settings."""
    _report_left_out(tensors, family, emit)
    _report_window(config, emit)
    if family.blind_to_pairs:
        message = (
            "llama.cpp gives every token the first token type: its answers about pairs of texts "
            "differ from those of transformers"
        )
        emit(Notice(kind="warning", subject="token types", message=message))


def _report_left_out(tensors: Sequence[str], family: Family, emit: Emit) -> None:
    names = [name for name in tensors if name.endswith(family.left_out)]
    if family.left_out and names:
        message = f"{len(names)} tensors have no part in llama.cpp's encoder and are left out"
        emit(Notice(kind="skipped", subject=names[0], message=message))


def _report_window(config: Config, emit: Emit) -> None:
    window = config.get("sliding_window")
    if (
        window
        and config.get("use_sliding_window", True)
        and window < config["max_position_embeddings"]
    ):
        message = (
            f"the model looks back {window} tokens; llama.cpp looks at all, and answers "
            "differently beyond that"
        )
        emit(Notice(kind="warning", subject="sliding_window", message=message))
