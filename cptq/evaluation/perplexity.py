"""Perplexity in windows with a BOS, or by the GPTQ repository; two numbers that compare tokenizers.

The whole text is tokenised once, with the special tokens that the tokenizer adds by itself, and cut
into windows of `seqlen` tokens that do not overlap; the rest, shorter than a window, is dropped. In
each window every token but the first is predicted from those before it in the window, so that

    perplexity = exp( sum of nll / (windows * (seqlen - 1)) )        nll in nats

Where the tokenizer puts a BOS before a text (Gemma, Llama, OPT; `find_bos`), there are two
protocols, and a result names the one it was measured by:

    every   each window is the BOS and seqlen - 1 tokens of text, all of which are predicted. The
            default: models that were trained with a BOS in front of every sequence need it. A
            Gemma-like model reads perplexity 131 with a BOS in the first window alone, and 32 so.
    first   the GPTQ repository's: windows are cut from the text with the BOS before it, so that
            the first window alone has one. For comparison with published numbers. (The repository
            multiplies a window's mean loss over seqlen - 1 tokens by seqlen and divides by
            windows * seqlen: the same number.)

The BOS itself is never predicted. Where the tokenizer adds none the two are one and the same.

Word perplexity exp(sum nll / words) and bits per byte sum nll / (bytes * ln 2) are normalised as in
lm-evaluation-harness, by words and UTF-8 bytes of the text itself; the words and bytes counted are
those of the predicted tokens (a word where its last character is). They compare models of different
vocabularies. The harness's task `wikitext` removes the corpus's spacing, predicts every token and
counts empty strings at the ends of a page as words, so its digits differ: those are the task
`wikitext-rolling` (cptq.evaluation.tasks.rolling).

Standard errors take windows as the independent samples (a ratio estimate: delta method); they are
None for a single window.

Cost: one forward of each window without a cache of keys and values. Logits are made for a few
hundred positions at a time where the model is a body and a linear head (checked on the first
window), so that memory is bounded by LOGIT_ELEMENTS and not by seqlen * vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cptq.evaluation.split_model import (
    LOGIT_ELEMENTS,
    Chunk,
    count_positions,
    split_model,
)
from cptq.types import EvalResult
from cptq.types.samples import Link, build_ratios

#: tokens of one forward, whatever the batch size (one window is always taken)
FORWARD_TOKENS = 4096

#: (metric, unit, link, what the nll of each sample is divided by)
Count = tuple[str, str, Link, np.ndarray[Any, np.dtype[np.int64]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A tokenised text: ids (tokens,) int64 and where in the text each token ends.

    `ends` (tokens,) are character positions, never decreasing; None if the tokenizer gives none.
    """

    text: str
    ids: Tensor
    ends: np.ndarray[Any, np.dtype[np.int64]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and its standard error (None: not known)."""

    value: float
    stderr: float | None


def tokenize(tokenizer: Any, text: str) -> Tokens:
    """Tokenise the text as one sequence, with the tokenizer's own special tokens."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, verbose=False, truncation=False, return_offsets_mapping=fast)
    ends = None
    if fast:
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(offsets[:, 1])  # special tokens are (0, 0)
    return Tokens(text=text, ids=torch.tensor(found["input_ids"], dtype=torch.int64), ends=ends)


def cut_windows(ids: Tensor, seqlen: int, bos: int | None = None) -> Tensor:
    """Cut (windows, seqlen) consecutive windows, the rest dropped.

    With a `bos` each is that token and seqlen - 1 of `ids`.
    """
    room = seqlen - (bos is not None)
    windows = ids.numel() // room
    rows = ids[: windows * room].view(windows, room)
    return rows if bos is None else torch.cat([rows.new_full((windows, 1), bos), rows], 1)


def count_words_and_bytes(
    tokens: Tokens, first_N: np.ndarray[Any, Any], last_N: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Count (words, bytes), each (windows,), of the tokens after token `first` up to token `last`.

    A token's text reaches from the end of the token before to its own end, so that spaces between
    tokens count. None if the tokenizer gives no offsets.
    """
    if tokens.ends is None:
        return None
    last_of_word = np.array([m.end() for m in re.finditer(r"\S+", tokens.text)], dtype=np.int64)
    begin, end = tokens.ends[first_N], tokens.ends[last_N]
    words = np.searchsorted(last_of_word, end, "right") - np.searchsorted(
        last_of_word, begin, "right"
    )
    pieces = (tokens.text[a:b] for a, b in zip(begin, end, strict=True))
    return words, np.array([len(piece.encode()) for piece in pieces])


def _sum_nll(
    head: nn.Module,
    hidden_BTC: Tensor,
    labels_BT: Tensor,
    row: int,
    hook: Callable[[Chunk], bool] | None,
) -> Tensor:
    """Sum the nll of labels, a chunk of positions at a time: (batch,) float64.

    `row` is the place of the first window; `hook` gets every chunk, and takes it over or not.
    """
    size = count_positions(head, hidden_BTC, LOGIT_ELEMENTS)
    sums_B = torch.zeros(len(labels_BT), dtype=torch.float64, device=labels_BT.device)
    for start in range(0, labels_BT.shape[1], size):
        positions = slice(start, start + size)
        chunk = Chunk(
            head=head,
            rows=slice(row, row + len(labels_BT)),
            positions=positions,
            hidden_BTC=hidden_BTC[:, positions],
            labels_BT=labels_BT[:, positions],
        )
        taken = hook is not None and hook(chunk)
        sums_B += torch.nan if taken else chunk.compute_nll().sum(1)
    return sums_B


def measure_nll(
    module: nn.Module,
    windows_NT: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
    hook: Callable[[Chunk], bool] | None = None,
) -> Tensor:
    """Measure each window's summed nll of its seqlen - 1 predictions: (windows,) float64, CPU.

    `hook` is called with every chunk of predictions. Where it returns True it takes them over:
    their logits are not made here, and the sums of these windows are NaN.
    """
    rows = max(1, min(batch_size, FORWARD_TOKENS // windows_NT.shape[1]))
    sums: list[Tensor] = []
    done = 0
    with torch.inference_mode():
        model = split_model(module, windows_NT[:1].to(device))
        for batch in windows_NT.split(rows):
            ids_BT = batch.to(device)
            hidden_BTC, labels_BT = model.compute_hidden(ids_BT)[:, :-1], ids_BT[:, 1:]
            sums.append(_sum_nll(model.head, hidden_BTC, labels_BT, done, hook).cpu())
            done += len(batch)
            progress(done)
    return torch.cat(sums)


def estimate_ratio(nll_N: np.ndarray[Any, Any], count_N: np.ndarray[Any, Any]) -> Estimate:
    """Divide the sum of nll by the sum of counts, with the standard error of a ratio of sums."""
    value, windows = float(nll_N.sum() / count_N.sum()), len(nll_N)
    if windows < 2:
        return Estimate(value=value, stderr=None)
    residual = float(((nll_N - value * count_N) ** 2).sum())
    spread = math.sqrt(residual * windows / (windows - 1)) / float(count_N.sum())
    return Estimate(value=value, stderr=spread)


def exponentiate(rate: Estimate) -> Estimate:
    """Take exp of an estimate in nats; infinite where a float cannot hold it."""
    value = math.exp(rate.value) if rate.value < 709 else math.inf
    finite = rate.stderr is not None and math.isfinite(value)
    return Estimate(value=value, stderr=value * (rate.stderr or 0.0) if finite else None)


def convert_to_bits(rate: Estimate) -> Estimate:
    """Convert an estimate from nats to bits."""
    stderr = None if rate.stderr is None else rate.stderr / math.log(2)
    return Estimate(value=rate.value / math.log(2), stderr=stderr)


def apply_link(rate: Estimate, link: Link) -> Estimate:
    """Turn an estimate of a ratio of sums into the value that is reported."""
    if link == "mean":
        return rate
    return exponentiate(rate) if link == "exp" else convert_to_bits(rate)


def build_text_results(
    nll_N: np.ndarray[Any, Any], counts: Iterable[Count], **common: Any
) -> list[EvalResult]:
    """Return one result per count, from the nll of each sample; `common` are the other fields."""
    return [
        EvalResult(
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            unit=unit,
            higher_is_better=False,
            samples=len(nll_N),
            per_sample=build_ratios(nll_N, count_N, link),
            **common,
        )
        for metric, unit, link, count_N in counts
        for estimate in (apply_link(estimate_ratio(nll_N, count_N), link),)
    ]
