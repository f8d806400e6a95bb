"""Perplexity on any text: the measuring that all text tasks share, the embedded text, a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cptq.calibration.tokens import token_digest
from cptq.checkpoint.model import LoadedModel
from cptq.data import Text, load_text
from cptq.errors import DataError, EvaluationError
from cptq.evaluation import TEXT_PREFIX
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.perplexity import (
    Tokens,
    counts_per_window,
    cut_windows,
    linked,
    ratio,
    tokenize,
    window_nll,
)
from cptq.types import Emit, EvalResult, Notice, Progress
from cptq.types.samples import Link, ratios

VERSION = 1
DEFAULT_SEQLEN = 2048


def pydoc(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity on the evaluation part of the text that every Python carries."""
    return measure_text(model, name, load_text("pydoc", "evaluation"), options, emit)


def text_file(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity on the file of the task `text:PATH`."""
    text = load_text(name.removeprefix(TEXT_PREFIX), "evaluation")
    return measure_text(model, name, text, options, emit)


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
    windows_NT = cut_windows(tokens.ids, seqlen)
    windows_NT = windows_NT[: options.count(len(windows_NT))]
    options.watch(name, [_covered(tokens, windows_NT.numel())])
    nll_N = _nll(model, name, windows_NT, options, emit)
    seconds, fingerprint = time.perf_counter() - begin, token_digest(windows_NT)
    return [
        EvalResult(
            task=name,
            version=VERSION,
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            unit=unit,
            higher_is_better=False,
            samples=len(windows_NT),
            seconds=seconds,
            seqlen=seqlen,
            tokens=len(windows_NT) * (seqlen - 1),
            data_source=text.origin,
            data_sha256=text.sha256,
            data_fingerprint=fingerprint,
            per_sample=ratios(nll_N, count_N, link),
            notes=text.notes,
        )
        for metric, unit, link, count_N in _counts(len(nll_N), tokens, seqlen, name, emit)
        for estimate in (linked(ratio(nll_N, count_N), link),)
    ]


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


def _nll(
    model: LoadedModel, name: str, windows_NT: torch.Tensor, options: EvalOptions, emit: Emit
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    total = len(windows_NT)
    emit(Progress(stage=name, done=0, total=total, message="windows"))
    nll_N = window_nll(
        model.module,
        windows_NT,
        batch_size=options.batch_size,
        device=model.device,
        progress=lambda done: emit(Progress(stage=name, done=done, total=total)),
    ).numpy()
    if not np.isfinite(nll_N).all():
        raise EvaluationError(
            f"the outputs of {model.source} on {name} are not finite",
            hint="try --dtype float32, or look at the weights",
        )
    return nll_N


def _counts(
    windows: int, tokens: Tokens, seqlen: int, name: str, emit: Emit
) -> Iterator[tuple[str, str, Link, np.ndarray[Any, Any]]]:
    """(metric, unit, link, what each window's nll is divided by)."""
    yield "perplexity", "per token", "exp", np.full(windows, seqlen - 1)
    counts = counts_per_window(tokens, windows, seqlen)
    if counts is None or not counts[0].any():
        why = "the tokenizer does not say where tokens end" if counts is None else "no whole word"
        message = f"no word perplexity and no bits per byte: {why}"
        emit(Notice(kind="skipped", subject=name, message=message))
        return
    words, size = counts
    yield "word_perplexity", "per word", "exp", words
    yield "bits_per_byte", "bits per byte", "bits", size
