"""Log-likelihoods of continuations of a context, as lm-evaluation-harness scores them (Gao et al.,
"A framework for few-shot language model evaluation"; `HFLM`).

Context and continuation are tokenised together and cut apart at the length of the context's own
tokens; spaces at the end of the context go to the continuation. An empty context is the prefix
token (BOS, else EOS). A sequence longer than the model takes loses tokens on the left. The score is
the sum of ln p(token | all before) over the continuation, and `greedy` states whether every one of
its tokens was the most likely.

Rows that feed the same tokens to the model are fed once: "yes" and "no" after one question are two
readings of one forward. Rows are sorted by length and padded on the right, which no earlier
position of a causal model can see; so neither the padding token (none is needed) nor the batch size
nor the tokenizer's padding side changes a score. Logits are made at the continuation's positions
only. float32 inside, sums in float64.

A text is scored whole by windows that roll over it, each a continuation of what came before. They
hold `length` tokens of input. The first predicts all its tokens, the very first of them from a
prefix token; each later window predicts the next `stride` tokens and has the `length - stride + 1`
before them as context. A stride of `length` is cheapest and gives the first tokens of a window
little context; a stride of 1 gives every token all the context there can be, at `length` times the
cost. The last window predicts what is left. These are the windows of the harness
(`get_rolling_token_windows` with a context of length - stride + 1; its `loglikelihood_rolling`
always has stride = length).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.tokenizer import check_token_ids
from cptq.errors import EvaluationError
from cptq.evaluation.split_model import (
    LOGIT_ELEMENTS,
    SplitModel,
    count_positions,
    split_model,
)
from cptq.types import Emit, Notice, Progress

#: tokens of one forward, whatever the batch size (one row is always taken)
FORWARD_TOKENS = 4096
#: what the harness takes where neither the config nor the tokenizer states a length
DEFAULT_LENGTH = 2048
_NO_LIMIT = 10**6

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Token ids of a context and of the continuation that is scored. Neither is empty."""

    context: Ids
    continuation: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBatch:
    """Requests that fit a model of `length` tokens; `truncated` lose context on the left."""

    requests: tuple[Request, ...]
    length: int
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens of all contexts and continuations."""
        return sum(len(r.context) + len(r.continuation) for r in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of every request: the log-likelihood in nats (float64) and whether it was all greedy."""

    loglikelihood: Tensor
    greedy: Tensor


class Encoder:
    """Encodes text with a model's tokenizer as the harness does.

    Raises:
        EvaluationError: the model has no tokenizer, or its tokenizer no BOS and no EOS token.
    """

    def __init__(self, spec: ModelSpec, name: str) -> None:
        if spec.tokenizer is None:
            raise EvaluationError(f"{spec.source} has no tokenizer, and {name} needs one")
        self._spec, self._tokenizer = spec, cast(Any, spec.tokenizer)
        found = [spec.tokenizer.bos_token_id, spec.tokenizer.eos_token_id]
        known = [token for token in found if token is not None]
        if not known:
            raise EvaluationError(
                f"the tokenizer of {spec.source} has no BOS and no EOS token, and {name} begins "
                "with one",
                hint="set bos_token in tokenizer_config.json",
            )
        self.prefix = int(known[0])
        self._prefix_text = str(self._tokenizer.decode([self.prefix]))

    def encode(self, text: str) -> Ids:
        """Encode a text, with special tokens unless it begins with the prefix."""
        special = {"add_special_tokens": False} if text.startswith(self._prefix_text) else {}
        return self._check(self._tokenizer.encode(text, verbose=False, **special))

    def build_request(self, context: str, continuation: str) -> Request:
        """Encode context and continuation together.

        Raises:
            EvaluationError: the continuation adds no token.
        """
        if context == "":
            ids = (self.prefix, *self._encode_plain(continuation))
            ids = ids[1:] if ids[1:2] == (self.prefix,) else ids
            return _build_request(ids[:1], ids[1:], continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        given = self.encode(context)
        return _build_request(
            given, self.encode(context + continuation)[len(given) :], continuation
        )

    def _encode_plain(self, text: str) -> Ids:
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return self._check(ids)

    def _check(self, ids: Sequence[int]) -> Ids:
        check_token_ids(self._spec, [ids])
        return tuple(ids)


def _build_request(context: Ids, continuation: Ids, text: str) -> Request:
    if not context or not continuation:
        raise EvaluationError(
            f"the continuation {text!r} has no token of its own after its context",
            hint="look at the data: an answer may be empty",
        )
    return Request(context=context, continuation=continuation)


def choose_length(spec: ModelSpec, asked: int | None) -> int:
    """Choose how many tokens the model is fed at most.

    As asked, else the model's positions, else the tokenizer's limit, else 2,048.

    Raises:
        EvaluationError: more was asked than the model has positions.
    """
    most = spec.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"--seqlen {asked} is more than the {most} positions of {spec.source}",
            allowed=f"2 to {most}",
        )
    stated = int(getattr(spec.tokenizer, "model_max_length", _NO_LIMIT))
    return asked or most or (stated if stated < _NO_LIMIT else DEFAULT_LENGTH)


def check_stride(stride: int | None, length: int) -> int:
    """Return the stride, `length` by default.

    Raises:
        EvaluationError: it is more than `length`, so that tokens would be skipped.
    """
    if stride is not None and stride > length:
        raise EvaluationError(
            f"--stride {stride} is more than the window of {length} tokens",
            allowed=f"1 to {length}",
        )
    return stride or length


def roll_windows(ids: Sequence[int], prefix: int, length: int, stride: int) -> list[Request]:
    """Roll windows over `ids`, all of which are predicted. 1 <= stride <= length."""
    whole = (prefix, *ids)
    windows, done = [], 0
    while done < len(ids):
        end = min(done + (length if done == 0 else stride), len(ids))
        begin = max(0, end - length)  # in `whole`, which is one ahead of `ids`
        windows.append(
            Request(context=whole[begin : done + 1], continuation=whole[done + 1 : end + 1])
        )
        done = end
    return windows


def batch_requests(
    requests: Iterable[Request], *, length: int, name: str, emit: Emit
) -> RequestBatch:
    """Check the requests against the model's length; a Notice counts the contexts to be cut.

    Raises:
        EvaluationError: a continuation is longer than `length`.
    """
    found = tuple(requests)
    for request in found:
        if len(request.continuation) > length:
            raise EvaluationError(
                f"an answer of {name} has {len(request.continuation)} tokens, and the model takes "
                f"{length}",
                hint="allow more with --seqlen, if the model can",
            )
    truncated = sum(len(r.context) + len(r.continuation) > length + 1 for r in found)
    if truncated:
        message = f"{truncated} of {len(found)} contexts were cut on the left to {length} tokens"
        emit(Notice(kind="warning", subject=name, message=message))
    return RequestBatch(requests=found, length=length, truncated=truncated)


def score_requests(
    model: LoadedModel, asked: RequestBatch, *, batch_size: int, name: str, emit: Emit
) -> Scores:
    """Score every request, in the given order.

    Raises:
        EvaluationError: an output is not finite.
    """
    requests = asked.requests
    rows = _group_by_input(asked)
    sums = torch.empty(len(requests), dtype=torch.float64)
    greedy = torch.empty(len(requests)).bool()
    order = sorted(rows, key=lambda row: (-len(row), row))
    with torch.inference_mode():
        parts = split_model(model.module, torch.tensor([order[0]], device=model.device))
        done = 0
        for batch in _split_batches(order, batch_size):
            emit(Progress(stage=name, done=done, total=len(order), message="continuations"))
            answered = [(row, i) for row, ids in enumerate(batch) for i in rows[ids]]
            wanted = [(row, len(batch[row]), requests[i].continuation) for row, i in answered]
            places = torch.tensor([i for _, i in answered])
            sums[places], greedy[places] = _score_batch(parts, batch, wanted, model.device)
            done += len(batch)
    emit(Progress(stage=name, done=len(order), total=len(order)))
    if not bool(torch.isfinite(sums).all()):
        raise EvaluationError(
            f"the outputs of {model.source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    return Scores(loglikelihood=sums, greedy=greedy)


def _group_by_input(asked: RequestBatch) -> dict[Ids, list[int]]:
    """Group requests by the tokens fed to the model (the last token is never fed)."""
    rows: dict[Ids, list[int]] = {}
    for index, request in enumerate(asked.requests):
        fed = (request.context + request.continuation)[-(asked.length + 1) :][:-1]
        rows.setdefault(fed, []).append(index)
    return rows


def _split_batches(order: Sequence[Ids], batch_size: int) -> Iterator[list[Ids]]:
    """Split the rows into batches of consecutive ones; the first of a batch is its longest."""
    start = 0
    while start < len(order):
        size = max(1, min(batch_size, FORWARD_TOKENS // len(order[start])))
        yield list(order[start : start + size])
        start += size


def _score_batch(
    parts: SplitModel,
    batch: Sequence[Ids],
    wanted: Sequence[tuple[int, int, Ids]],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return (log-likelihoods, greedy) of `wanted`: (row, its length, the ids at its end)."""
    longest = len(batch[0])
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)
    hidden_BTC = parts.compute_hidden(ids_BT)
    states = [hidden_BTC[row, length - len(ids) : length] for row, length, ids in wanted]
    labels_P = torch.tensor([token for _, _, ids in wanted for token in ids], device=device)
    values_P, right_P = score_tokens(parts.head, torch.cat(states), labels_P)
    sizes = [len(ids) for _, _, ids in wanted]
    sums = torch.stack([part.sum() for part in values_P.split(sizes)])
    return sums, torch.stack([part.all() for part in right_P.split(sizes)])


def score_tokens(head: nn.Module, hidden_PC: Tensor, labels_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ln p of each label, float64; whether it is the most likely), on the CPU."""
    size = count_positions(head, hidden_PC.unsqueeze(0), LOGIT_ELEMENTS)
    values, right = [], []
    for hidden, labels in zip(hidden_PC.split(size), labels_P.split(size), strict=True):
        logits = head(hidden).float()
        chosen = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
        values.append(chosen.double().cpu())
        right.append((logits.argmax(-1) == labels).cpu())
    return torch.cat(values), torch.cat(right)
