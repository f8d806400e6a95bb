"""How likely a causal language model finds a continuation of a context, as lm-evaluation-harness
scores it (Gao et al., "A framework for few-shot language model evaluation"; `HFLM`).

Context and continuation are tokenised together and cut apart at the length of the context's own
tokens; spaces at the end of the context go to the continuation. An empty context is the prefix
token (BOS, else EOS). What is longer than the model takes loses tokens on the left. The score is
the sum of ln p(token | all before) over the continuation, and `greedy` says whether every one of
its tokens was the most likely.

Rows that feed the same tokens to the model are fed once: "yes" and "no" after one question are two
readings of one forward. Rows are sorted by length and padded on the right, which no earlier
position of a causal model can see; so neither the padding token (none is needed) nor the batch size
nor the tokenizer's padding side changes a score. Logits are made at the continuation's positions
only. float32 inside, sums in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cptq.checkpoint.model import LoadedModel
from cptq.errors import EvaluationError
from cptq.evaluation.halves import LOGIT_ELEMENTS, Halves, halves, positions_at_once
from cptq.types import Emit, Notice, Progress

#: tokens of one forward, whatever the batch size (one row is always taken)
FORWARD_TOKENS = 4096
#: what the harness takes where neither the config nor the tokenizer states a length
DEFAULT_LENGTH = 2048
_NO_LIMIT = 10**6

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Token ids: what is given, and what is scored. Neither is empty."""

    context: Ids
    continuation: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of every request: the log-likelihood in nats (float64) and whether it was all greedy."""

    loglikelihood: Tensor
    greedy: Tensor
    truncated: int


class Encoder:
    """A tokenizer as the harness uses it."""

    def __init__(self, model: LoadedModel, name: str) -> None:
        if model.tokenizer is None:
            raise EvaluationError(f"{model.source} has no tokenizer, and {name} needs one")
        self._tokenizer: Any = model.tokenizer
        found = [model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]
        known = [token for token in found if token is not None]
        if not known:
            raise EvaluationError(
                f"the tokenizer of {model.source} has no BOS and no EOS token, and {name} begins "
                "with one",
                hint="set bos_token in tokenizer_config.json",
            )
        self.prefix = int(known[0])
        self._prefix_text = str(self._tokenizer.decode([self.prefix]))

    def text(self, text: str) -> Ids:
        """A text with the tokenizer's own special tokens, unless it begins with the prefix."""
        special = {"add_special_tokens": False} if text.startswith(self._prefix_text) else {}
        return tuple(self._tokenizer.encode(text, verbose=False, **special))

    def request(self, context: str, continuation: str) -> Request:
        """The two as token ids.

        Raises:
            EvaluationError: the continuation adds no token.
        """
        if context == "":
            ids = (self.prefix, *self._plain(continuation))
            ids = ids[1:] if ids[1:2] == (self.prefix,) else ids
            return _checked(ids[:1], ids[1:], continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        given = self.text(context)
        return _checked(given, self.text(context + continuation)[len(given) :], continuation)

    def _plain(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _checked(context: Ids, continuation: Ids, text: str) -> Request:
    if not context or not continuation:
        raise EvaluationError(
            f"the continuation {text!r} has no token of its own after its context",
            hint="look at the data: an answer may be empty",
        )
    return Request(context=context, continuation=continuation)


def context_length(model: LoadedModel, asked: int | None) -> int:
    """Tokens that the model is fed at most: as asked, else the model's, the tokenizer's, 2,048.

    Raises:
        EvaluationError: more was asked than the model has positions.
    """
    most = model.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"--seqlen {asked} is more than the {most} positions of {model.source}",
            allowed=f"2 to {most}",
        )
    stated = int(getattr(model.tokenizer, "model_max_length", _NO_LIMIT))
    return asked or most or (stated if stated < _NO_LIMIT else DEFAULT_LENGTH)


def score(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    length: int,
    batch_size: int,
    name: str,
    emit: Emit,
) -> Scores:
    """Score every request, in the given order.

    Raises:
        EvaluationError: a continuation is longer than `length`, or an output is not finite.
    """
    rows = _rows(requests, length, name)
    sums, greedy = (
        torch.empty(len(requests), dtype=torch.float64),
        torch.empty(len(requests)).bool(),
    )
    truncated = sum(len(r.context) + len(r.continuation) > length + 1 for r in requests)
    if truncated:
        message = f"{truncated} of {len(requests)} contexts were cut on the left to {length} tokens"
        emit(Notice(kind="warning", subject=name, message=message))
    order = sorted(rows, key=lambda row: (-len(row), row))
    with torch.inference_mode():
        parts = halves(model.module, torch.tensor([order[0]], device=model.device))
        done = 0
        for batch in _batches(order, batch_size):
            emit(Progress(stage=name, done=done, total=len(order), message="continuations"))
            asked = [(row, i) for row, ids in enumerate(batch) for i in rows[ids]]
            wanted = [(row, len(batch[row]), requests[i].continuation) for row, i in asked]
            places = torch.tensor([i for _, i in asked])
            sums[places], greedy[places] = _score_batch(parts, batch, wanted, model.device)
            done += len(batch)
    emit(Progress(stage=name, done=len(order), total=len(order)))
    if not bool(torch.isfinite(sums).all()):
        raise EvaluationError(
            f"the outputs of {model.source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    return Scores(loglikelihood=sums, greedy=greedy, truncated=truncated)


def _rows(requests: Sequence[Request], length: int, name: str) -> dict[Ids, list[int]]:
    """What is fed to the model -> the requests that it answers (the last token is never fed)."""
    rows: dict[Ids, list[int]] = {}
    for index, request in enumerate(requests):
        if len(request.continuation) > length:
            raise EvaluationError(
                f"an answer of {name} has {len(request.continuation)} tokens, and the model takes "
                f"{length}",
                hint="allow more with --seqlen, if the model can",
            )
        fed = (request.context + request.continuation)[-(length + 1) :][:-1]
        rows.setdefault(fed, []).append(index)
    return rows


def _batches(order: Sequence[Ids], batch_size: int) -> Iterator[list[Ids]]:
    """Consecutive rows; the first of a batch is its longest."""
    start = 0
    while start < len(order):
        size = max(1, min(batch_size, FORWARD_TOKENS // len(order[start])))
        yield list(order[start : start + size])
        start += size


def _score_batch(
    parts: Halves,
    batch: Sequence[Ids],
    wanted: Sequence[tuple[int, int, Ids]],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(log-likelihoods, greedy) of `wanted`: (row, its length, the ids at its end)."""
    longest = len(batch[0])
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)
    hidden_BTC = parts.hidden(ids_BT)
    states = [hidden_BTC[row, length - len(ids) : length] for row, length, ids in wanted]
    labels_P = torch.tensor([token for _, _, ids in wanted for token in ids], device=device)
    values_P, right_P = token_scores(parts.head, torch.cat(states), labels_P)
    sizes = [len(ids) for _, _, ids in wanted]
    sums = torch.stack([part.sum() for part in values_P.split(sizes)])
    return sums, torch.stack([part.all() for part in right_P.split(sizes)])


def token_scores(head: nn.Module, hidden_PC: Tensor, labels_P: Tensor) -> tuple[Tensor, Tensor]:
    """(ln p of each label, float64; whether it is the most likely), on the CPU."""
    size = positions_at_once(head, hidden_PC.unsqueeze(0), LOGIT_ELEMENTS)
    values, right = [], []
    for hidden, labels in zip(hidden_PC.split(size), labels_P.split(size), strict=True):
        logits = head(hidden).float()
        chosen = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        values.append(chosen.double().cpu())
        right.append((logits.argmax(-1) == labels).cpu())
    return torch.cat(values), torch.cat(right)
