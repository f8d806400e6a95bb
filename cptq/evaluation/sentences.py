"""Sentences through an encoder or a classifier, in batches that change no result.

Sentences are sorted by length, so that a batch holds little padding, and the outputs are put back
in order. Padding is always on the right and masked, whatever the tokenizer was saved with: learned
positions count from the left, so that padding there would move every word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cptq.checkpoint.model import LoadedModel
from cptq.errors import EvaluationError
from cptq.types import Emit, Notice, Progress

Batch = dict[str, Tensor]
Encoding = dict[str, list[int]]

#: values in the padding of each input; ids take the tokenizer's own
_PADDING = {"attention_mask": 0, "token_type_ids": 0}
#: a tokenizer without a limit says something beyond any model
_NO_LIMIT = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Tokenised sentences: `rows[i]` are the unpadded model inputs of sentence i."""

    rows: tuple[Encoding, ...]
    max_length: int | None
    truncated: int
    pad_id: int | None

    @property
    def tokens(self) -> int:
        """Tokens of all sentences, special ones included."""
        return sum(len(row["input_ids"]) for row in self.rows)


def encode(
    model: LoadedModel,
    sentences: Sequence[tuple[str, ...]],
    max_length: int | None,
    name: str,
    emit: Emit,
) -> Encoded:
    """Tokenise sentences or pairs, cut at `max_length` tokens; a Notice counts those cut.

    Raises:
        EvaluationError: the model has no tokenizer, or `max_length` is beyond its positions.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise EvaluationError(f"{model.source} has no tokenizer, and {name} needs one")
    limit = _limit(model, max_length)
    columns = [list(column) for column in zip(*sentences, strict=True)]
    accepted = _accepted(model.module)
    rows = _rows(tokenizer, columns, accepted, None)
    long = [i for i, row in enumerate(rows) if limit and len(row["input_ids"]) > limit]
    if long:
        cut = _rows(tokenizer, [[column[i] for i in long] for column in columns], accepted, limit)
        for i, row in zip(long, cut, strict=True):
            rows[i] = row
        message = f"{len(long)} of {len(rows)} samples were cut at {limit} tokens"
        emit(Notice(kind="warning", subject=name, message=message))
    return Encoded(
        rows=tuple(rows), max_length=limit, truncated=len(long), pad_id=tokenizer.pad_token_id
    )


def _limit(model: LoadedModel, asked: int | None) -> int | None:
    most = model.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"a length of {asked} tokens is more than the {most} positions of {model.source}",
            allowed=f"1 to {most}",
        )
    stated = int(getattr(model.tokenizer, "model_max_length", _NO_LIMIT))
    known = [asked] if asked else [n for n in (most, stated) if n and n < _NO_LIMIT]
    return min(known, default=None)


def _accepted(module: nn.Module) -> list[str]:
    """The inputs that the model names (DistilBERT knows no token types)."""
    known = inspect.signature(module.forward).parameters
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]


def _rows(
    tokenizer: Any, columns: list[list[str]], accepted: list[str], limit: int | None
) -> list[Encoding]:
    found = tokenizer(
        *columns, padding=False, truncation=limit is not None, max_length=limit, verbose=False
    )
    names = [name for name in accepted if name in found]
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(found[name] for name in names), strict=True)
    ]


def pad(rows: Sequence[Encoding], pad_id: int) -> Batch:
    """Rows of one batch as tensors (batch, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad_id, **_PADDING}
    return {
        name: torch.tensor(
            [row[name] + [fills[name]] * (longest - len(row[name])) for row in rows],
            dtype=torch.int64,
        )
        for name in rows[0]
    }


def forward(
    model: LoadedModel,
    encoded: Encoded,
    function: Callable[[Batch], Tensor],
    *,
    batch_size: int,
    name: str,
    emit: Emit,
) -> Tensor:
    """(sentences, width) float32 on the CPU: `function` of every batch, in the given order.

    Raises:
        EvaluationError: an output is not finite.
    """
    if encoded.pad_id is None and batch_size > 1:
        message = "one sentence at a time: the tokenizer has no padding token"
        emit(Notice(kind="fallback", subject=name, message=message))
        batch_size = 1
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            emit(Progress(stage=name, done=start, total=len(order), message="sentences"))
            rows = [encoded.rows[i] for i in order[start : start + batch_size]]
            batch = {key: value.to(model.device) for key, value in _padded(rows, encoded).items()}
            outputs.append(function(batch).float().cpu())
    emit(Progress(stage=name, done=len(order), total=len(order)))
    return _in_order(torch.cat(outputs), order, model.source, name)


def _padded(rows: Sequence[Encoding], encoded: Encoded) -> Batch:
    return pad(rows, encoded.pad_id or 0)


def _in_order(sorted_NC: Tensor, order: list[int], source: str, name: str) -> Tensor:
    if not bool(torch.isfinite(sorted_NC).all()):
        raise EvaluationError(
            f"the outputs of {source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    outputs_NC = torch.empty_like(sorted_NC)
    outputs_NC[torch.tensor(order)] = sorted_NC
    return outputs_NC
