"""Run sentences through an encoder or a classifier, in batches that change no result.

Sentences are sorted by length, so that a batch holds little padding, and the outputs are put back
in order. Padding is always on the right and masked, whatever the tokenizer was saved with: learned
positions count from the left, so that padding there would move every word.

Embeddings are made as sentence-transformers makes them. The last hidden states are averaged over
the attention mask ("mean"), or the first one is taken ("cls"), as `1_Pooling/config.json` in the
checkpoint says; mean where there is no such file. Sentences are cut at `max_seq_length` of
`sentence_bert_config.json`, else at 128 tokens. Two embeddings are compared by their cosine, so
that normalising them changes nothing. Any other module that `modules.json` lists (a dense layer,
say) is refused: leaving it out would measure another model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.tokenizer import check_token_ids
from cptq.errors import EvaluationError
from cptq.types import Emit, Notice, Progress

Batch = dict[str, Tensor]
Encoding = dict[str, list[int]]

Pooling = Literal["mean", "cls"]
#: inputs that a model may take beside the ids (DistilBERT has no token types)
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: values in the padding of each input; ids take the tokenizer's own
_PADDING = {"attention_mask": 0, "token_type_ids": 0}
#: tokens at which a sentence is cut where the checkpoint of an encoder states no length
DEFAULT_LENGTH = 128
_MODULES = ("Transformer", "Pooling", "Normalize")
_OLD_KEYS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
#: a tokenizer without a limit states one beyond any model
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


def encode_sentences(
    spec: ModelSpec,
    sentences: Sequence[tuple[str, ...]],
    max_length: int | None,
    name: str,
    emit: Emit,
) -> Encoded:
    """Tokenise sentences or pairs, cut at `max_length` tokens; a Notice counts those cut.

    Raises:
        EvaluationError: the model has no tokenizer, or `max_length` is beyond its positions.
    """
    tokenizer = spec.tokenizer
    if tokenizer is None:
        raise EvaluationError(f"{spec.source} has no tokenizer, and {name} needs one")
    limit = _choose_limit(spec, max_length)
    columns = [list(column) for column in zip(*sentences, strict=True)]
    rows = _encode_rows(tokenizer, columns, None)
    long = [i for i, row in enumerate(rows) if limit and len(row["input_ids"]) > limit]
    if long:
        cut = _encode_rows(tokenizer, [[column[i] for i in long] for column in columns], limit)
        for i, row in zip(long, cut, strict=True):
            rows[i] = row
        message = f"{len(long)} of {len(rows)} samples were cut at {limit} tokens"
        emit(Notice(kind="warning", subject=name, message=message))
    check_token_ids(spec, (row["input_ids"] for row in rows))
    return Encoded(
        rows=tuple(rows), max_length=limit, truncated=len(long), pad_id=tokenizer.pad_token_id
    )


def _choose_limit(spec: ModelSpec, asked: int | None) -> int | None:
    most = spec.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"a length of {asked} tokens is more than the {most} positions of {spec.source}",
            allowed=f"1 to {most}",
        )
    stated = int(getattr(spec.tokenizer, "model_max_length", _NO_LIMIT))
    known = [asked] if asked else [n for n in (most, stated) if n and n < _NO_LIMIT]
    return min(known, default=None)


def _encode_rows(tokenizer: Any, columns: list[list[str]], limit: int | None) -> list[Encoding]:
    found = tokenizer(
        *columns, padding=False, truncation=limit is not None, max_length=limit, verbose=False
    )
    names = [name for name in _INPUTS if name in found]
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(found[name] for name in names), strict=True)
    ]


def pad(rows: Sequence[Encoding], pad_id: int) -> Batch:
    """Make tensors (batch, longest) of the rows of one batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad_id, **_PADDING}
    return {
        name: torch.tensor(
            [row[name] + [fills[name]] * (longest - len(row[name])) for row in rows],
            dtype=torch.int64,
        )
        for name in rows[0]
    }


def run_batches(
    model: LoadedModel,
    encoded: Encoded,
    compute: Callable[[Batch], Tensor],
    *,
    batch_size: int,
    name: str,
    emit: Emit,
) -> Tensor:
    """Compute (sentences, width) float32 on the CPU, batch by batch, in the given order.

    Raises:
        EvaluationError: an output is not finite.
    """
    lacking = "tokenizer" if encoded.pad_id is None else "model"
    unpadded = model.kind == "classifier" and model.config.pad_token_id is None
    if (encoded.pad_id is None or unpadded) and batch_size > 1:
        message = f"one sentence at a time: the {lacking} has no padding token"
        emit(Notice(kind="fallback", subject=name, message=message))
        batch_size = 1
    accepted = inspect.signature(model.module.forward).parameters
    lengths = [len(row["input_ids"]) for row in encoded.rows]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            emit(Progress(stage=name, done=start, total=len(order), message="sentences"))
            rows = [encoded.rows[i] for i in order[start : start + batch_size]]
            padded = pad(rows, encoded.pad_id or 0).items()
            batch = {key: ids.to(model.device) for key, ids in padded if key in accepted}
            outputs.append(compute(batch).float().cpu())
    emit(Progress(stage=name, done=len(order), total=len(order)))
    return _restore_order(torch.cat(outputs), order, model.source, name)


def _restore_order(sorted_NC: Tensor, order: list[int], source: str, name: str) -> Tensor:
    if not bool(torch.isfinite(sorted_NC).all()):
        raise EvaluationError(
            f"the outputs of {source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    outputs_NC = torch.empty_like(sorted_NC)
    outputs_NC[torch.tensor(order)] = sorted_NC
    return outputs_NC


def pool(hidden_BTC: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Pool to (batch, width) float32: the mean over the mask, or the first position."""
    if pooling == "cls":
        return hidden_BTC[:, 0].float()
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (hidden_BTC.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)


def compute_cosine(left_NC: Tensor, right_NC: Tensor) -> Tensor:
    """Compute the cosine of each pair of rows: (rows,) float64."""
    return torch.nn.functional.cosine_similarity(left_NC.double(), right_NC.double(), dim=1)


def read_pooling(path: Path) -> Pooling:
    """Read the pooling that a checkpoint's directory sets.

    Raises:
        EvaluationError: it sets another pooling, or further modules.
    """
    _refuse_other_modules(path)
    settings = _read_json(path / "1_Pooling" / "config.json")
    if not settings:
        return "mean"
    modes = [_OLD_KEYS.get(key, key) for key, on in settings.items() if _is_mode(key) and on]
    stated = settings.get("pooling_mode", modes)
    chosen = [stated] if isinstance(stated, str) else list(stated)
    if chosen == ["mean"]:
        return "mean"
    if chosen == ["cls"]:
        return "cls"
    raise EvaluationError(
        f"{path / '1_Pooling'} sets the pooling {', '.join(chosen) or 'none'}",
        allowed="mean, cls",
    )


def _is_mode(key: str) -> bool:
    return key.startswith("pooling_mode_")


def read_max_length(path: Path) -> int:
    """Read the number of tokens at which a sentence is cut."""
    return int(
        _read_json(path / "sentence_bert_config.json").get("max_seq_length") or DEFAULT_LENGTH
    )


def _refuse_other_modules(path: Path) -> None:
    modules = _read_json(path / "modules.json")
    types = [str(module.get("type", "")) for module in modules] if modules else []
    other = [name for name in types if name.rsplit(".", 1)[-1] not in _MODULES]
    if other:
        raise EvaluationError(
            f"{path} puts {', '.join(other)} on top of the encoder, which cptq does not run",
            allowed=", ".join(_MODULES),
        )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error
