"""Perplexity on any text: the measuring that all text tasks share, the embedded text, a file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptq.calibration.tokens import digest_tokens
from cptq.checkpoint.model import LoadedModel
from cptq.data import Text, load_text
from cptq.errors import DataError, EvaluationError
from cptq.evaluation import TEXT_PREFIX
from cptq.evaluation.continuations import score
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.perplexity import (
    Tokens,
    counts_between,
    cut_windows,
    linked,
    ratio,
    tokenize,
    window_nll,
)
from cptq.evaluation.rolling import checked_stride, rolling_windows
from cptq.types import Emit, EvalResult, Notice, Progress
from cptq.types.samples import Link, build_ratios

VERSION = 1
Numbers = np.ndarray[Any, Any]
DEFAULT_SEQLEN = 2048


def pydoc(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity on the evaluation part of the text that every Python carries."""
    return measure_text(model, name, load_text("pydoc", "evaluation"), options, emit)


def text_file(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity on the file of the task `text:PATH`."""
    text = load_text(name.removeprefix(TEXT_PREFIX), "evaluation")
    return measure_text(model, name, text, options, emit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The summed nll of every window, and which tokens it predicts: those after `first`, to `last`.

    `rows` are the windows' token ids.
    """

    nll_N: Numbers
    first_N: Numbers
    last_N: Numbers
    rows: Sequence[Tensor]
    notes: tuple[str, ...] = ()


def measure_text(
    model: LoadedModel, name: str, text: Text, options: EvalOptions, emit: Emit
) -> list[EvalResult]:
    """Perplexity (per token), word perplexity and bits per byte of a causal language model.

    Raises:
        EvaluationError: no tokenizer, `seqlen` beyond the model's positions, outputs not finite.
        DataError: fewer than two tokens.
    """
    for note in text.notes:
        emit(Notice(kind="fallback", subject=name, message=note))
    if model.tokenizer is None:
        raise EvaluationError(f"{model.source} has no tokenizer, and {name} needs one")
    begin = time.perf_counter()
    tokens = tokenize(model.tokenizer, text.text)
    seqlen = _fit(choose_seqlen(model, name, options.seqlen, emit), tokens, text, emit)
    measure = _rolled if options.stride else _cut
    found = measure(model, name, tokens, seqlen, options, emit)
    seconds, fingerprint = time.perf_counter() - begin, digest_tokens(found.rows)
    results = [
        EvalResult(
            task=name,
            version=VERSION,
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            unit=unit,
            higher_is_better=False,
            samples=len(found.nll_N),
            seconds=seconds,
            seqlen=seqlen,
            tokens=int((found.last_N - found.first_N).sum()),
            data_source=text.origin,
            data_sha256=text.sha256,
            data_fingerprint=fingerprint,
            per_sample=build_ratios(found.nll_N, count_N, link),
            notes=text.notes + found.notes,
        )
        for metric, unit, link, count_N in _counts(tokens, found, name, emit)
        for estimate in (linked(ratio(found.nll_N, count_N), link),)
    ]
    beside = options.beside.results(results[0]) if options.beside and not options.stride else []
    return [*results, *beside]


def _cut(
    model: LoadedModel,
    name: str,
    tokens: Tokens,
    seqlen: int,
    options: EvalOptions,
    emit: Emit,
) -> Measured:
    """Windows that do not overlap."""
    windows_NT = cut_windows(tokens.ids, seqlen)
    windows_NT = windows_NT[: options.count(len(windows_NT))]
    options.watch(name, [_covered(tokens, windows_NT.numel())])
    total = len(windows_NT)
    emit(Progress(stage=name, done=0, total=total, message="windows"))
    nll_N = window_nll(
        model.module,
        windows_NT,
        batch_size=options.batch_size,
        device=model.device,
        progress=lambda done: emit(Progress(stage=name, done=done, total=total)),
        witness=options.beside.open(name, windows_NT, emit) if options.beside else None,
    ).numpy()
    if not np.isfinite(nll_N).all():
        raise EvaluationError(
            f"the outputs of {model.source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    first_N = np.arange(total) * seqlen
    return Measured(
        nll_N=nll_N, first_N=first_N, last_N=first_N + seqlen - 1, rows=list(windows_NT)
    )


def _rolled(
    model: LoadedModel,
    name: str,
    tokens: Tokens,
    seqlen: int,
    options: EvalOptions,
    emit: Emit,
) -> Measured:
    """Windows that roll over the text; its first token is what the second is predicted from."""
    length = min(seqlen, tokens.ids.numel() - 1)
    stride = checked_stride(options.stride, length)
    prefix, *ids = tokens.ids.tolist()
    windows = rolling_windows(ids, prefix, length, stride)
    windows = windows[: options.count(len(windows))]
    last_N = np.cumsum([len(window.continuation) for window in windows])
    options.watch(name, [_covered(tokens, int(last_N[-1]) + 1)])
    if options.beside is not None:
        message = "KL to the baseline is measured on windows that do not overlap, without --stride"
        emit(Notice(kind="skipped", subject=name, message=message))
    scores = score(
        model, windows, length=length, batch_size=options.batch_size, name=name, emit=emit
    )
    return Measured(
        nll_N=-scores.loglikelihood.numpy(),
        first_N=np.concatenate([[0], last_N[:-1]]),
        last_N=last_N,
        rows=[torch.tensor(window.context + window.continuation) for window in windows],
        notes=(f"rolling windows of {length} tokens, stride {stride}",),
    )


def _covered(tokens: Tokens, count: int) -> str:
    """The text of the first `count` tokens; all of it if the tokenizer does not say."""
    return tokens.text if tokens.ends is None else tokens.text[: int(tokens.ends[count - 1])]


def choose_seqlen(model: LoadedModel, name: str, asked: int | None, emit: Emit) -> int:
    """The window: as asked, else 2,048 or the model's positions if those are fewer (a Notice).

    Raises:
        EvaluationError: more was asked than the model has positions.
    """
    most = model.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"--seqlen {asked} is more than the {most} positions of {model.source}",
            allowed=f"2 to {most}",
        )
    if asked is None and most is not None and most < DEFAULT_SEQLEN:
        message = f"windows of {most} tokens, the model's positions, instead of {DEFAULT_SEQLEN}"
        emit(Notice(kind="info", subject=name, message=message))
        return most
    return asked or DEFAULT_SEQLEN


def _fit(seqlen: int, tokens: Tokens, text: Text, emit: Emit) -> int:
    found = tokens.ids.numel()
    if found < 2:
        raise DataError(f"{text.origin} has {found} tokens, and perplexity needs two at least")
    if found < seqlen:
        message = f"one window of {found} tokens, all there are, instead of {seqlen}"
        emit(Notice(kind="fallback", subject=text.source, message=message))
    return min(found, seqlen)


def _counts(
    tokens: Tokens, found: Measured, name: str, emit: Emit
) -> Iterator[tuple[str, str, Link, Numbers]]:
    """(metric, unit, link, what each window's nll is divided by)."""
    yield "perplexity", "per token", "exp", found.last_N - found.first_N
    counts = counts_between(tokens, found.first_N, found.last_N)
    if counts is None or not counts[0].any():
        why = "the tokenizer does not say where tokens end" if counts is None else "no whole word"
        message = f"no word perplexity and no bits per byte: {why}"
        emit(Notice(kind="skipped", subject=name, message=message))
        return
    words, size = counts
    yield "word_perplexity", "per word", "exp", words
    yield "bits_per_byte", "bits per byte", "bits", size
