"""Which rows of the calibration batches measure what: some to fit on, some held out.

Language models are held out as short windows from the end of the text, so that a few hundred
tokens still come from several places; encoders and classifiers as whole sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from cptq.calibration.objective import real_tokens
from cptq.types import ModelKind

Rows = dict[str, Tensor]

#: tokens that flow through a model at once while it is measured
MICRO_TOKENS = 1024
#: windows that the held-out tokens of a language model are spread over
WINDOWS = 4


def token_count(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Number of tokens that are not padding."""
    return sum(int(real_tokens(batch).sum()) for batch in batches)


def micro_batches(batches: Iterable[Rows], tokens: int = MICRO_TOKENS) -> list[Rows]:
    """The same rows in pieces of at most `tokens` positions (one row at least), padding trimmed."""
    pieces = []
    for batch in batches:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            pieces.append(trimmed({k: v[start : start + rows] for k, v in batch.items()}))
    return pieces


def trimmed(batch: Rows) -> Rows:
    """Without the positions that are padding in every row (on the right only)."""
    used = real_tokens(batch).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return cropped(batch, length)


def cropped(batch: Rows, length: int) -> Rows:
    """The first `length` positions of every row."""
    positions = batch["input_ids"].shape[1]
    return {
        name: value[:, :length] if value.dim() > 1 and value.shape[1] == positions else value
        for name, value in batch.items()
    }


def split_held_out(
    batches: Iterable[Rows], kind: ModelKind, tokens: int
) -> tuple[list[Rows], list[Rows]]:
    """Single rows to fit on, and at most a quarter of the rows to hold out.

    Args:
        batches: calibration batches.
        kind: language models are held out as `WINDOWS` short windows.
        tokens: about how many tokens to hold out.

    Returns:
        (fit, held out), lists of one-row batches. With a single row both are that row.
    """
    rows = micro_batches(batches, tokens=1)
    most = max(1, len(rows) // 4)
    language = kind in ("causal-lm", "masked-lm")
    held: list[Rows] = []
    for row in reversed(rows[-most:]):
        if token_count(held) >= tokens or (language and len(held) == WINDOWS):
            break
        held.append(cropped(row, max(1, tokens // min(WINDOWS, most))) if language else row)
    fit = rows[: len(rows) - len(held)] or rows
    return fit, held[::-1]
