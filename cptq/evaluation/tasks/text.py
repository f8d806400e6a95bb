"""Perplexity on a text: WikiText, other corpora, the text that every Python carries, a file.

In windows side by side (`cptq.evaluation.perplexity`), or in windows that roll over the text if a
stride is given (`cptq.evaluation.continuations`); there, too, every window begins with the BOS that
the tokenizer adds, in the place of the first token of its context. Each corpus is taken as
`cptq.data` describes; no other text stands in for one that is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptq.calibration.tokens import digest_tokens
from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.special_tokens import find_bos
from cptq.checkpoint.tokenizer import check_token_ids
from cptq.data import Text, load_text
from cptq.data.corpora import C4_WINDOWS, CORPORA, load_corpus
from cptq.errors import DataError, EvaluationError
from cptq.evaluation import TEXT_PREFIX
from cptq.evaluation.continuations import (
    RequestBatch,
    batch_requests,
    check_stride,
    roll_windows,
    score_requests,
)
from cptq.evaluation.perplexity import (
    Count,
    Tokens,
    build_text_results,
    count_words_and_bytes,
    cut_windows,
    measure_nll,
    tokenize,
)
from cptq.evaluation.task import EvalOptions
from cptq.types import Emit, EvalResult, Notice, Progress

#: 2: every window has a BOS where the tokenizer adds one; in 1 only the first had
VERSION = 2
Numbers = np.ndarray[Any, Any]
DEFAULT_SEQLEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedText:
    """A tokenised text and its windows.

    `windows` are rows of `seqlen` tokens that do not overlap, or requests that roll over the text.
    Window i predicts the tokens after `first_N[i]`, up to `last_N[i]`.
    """

    name: str
    text: Text
    tokens: Tokens
    seqlen: int
    windows: Tensor | RequestBatch
    first_N: Numbers
    last_N: Numbers
    fingerprint: str
    protocol: str

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """The text up to the last predicted token; all of it if the tokenizer gives no offsets."""
        ends = self.tokens.ends
        covered = self.tokens.text if ends is None else self.tokens.text[: ends[self.last_N[-1]]]
        return {self.name: (covered,)}

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Measure perplexity (per token), word perplexity and bits per byte.

        Raises:
            EvaluationError: an output is not finite.
        """
        begin, observer = time.perf_counter(), options.observer
        if isinstance(self.windows, RequestBatch):
            nll_N = self._measure_rolled(self.windows, model, options, emit)
            observer = None
        else:
            nll_N = self._measure_cut(self.windows, model, options, emit)
        seconds = time.perf_counter() - begin
        build = partial(self._build_results, model.source, tuple(self._count(emit)), seconds)
        if observer is not None and observer.take_over(build):
            return []
        results = build(nll_N)
        return results + (observer.read_results(results[0]) if observer else [])

    def _build_results(
        self, source: str, counts: tuple[Count, ...], seconds: float, nll_N: Numbers
    ) -> list[EvalResult]:
        """Return the results of a model called `source`, from the nll of each window."""
        if not np.isfinite(nll_N).all():
            raise EvaluationError(
                f"the outputs of {source} on {self.name} are not finite",
                hint="try --dtype float32, or look at the weights",
            )
        return build_text_results(
            nll_N,
            counts,
            task=self.name,
            version=VERSION,
            seconds=seconds,
            seqlen=self.seqlen,
            tokens=int((self.last_N - self.first_N).sum()),
            data_source=self.text.origin,
            data_sha256=self.text.sha256,
            data_fingerprint=self.fingerprint,
            protocol=self.protocol,
            notes=self.text.notes,
        )

    def _measure_cut(
        self, windows_NT: Tensor, model: LoadedModel, options: EvalOptions, emit: Emit
    ) -> Numbers:
        total, seqlen = windows_NT.shape
        emit(Progress(stage=self.name, done=0, total=total, message="windows"))
        observer, shape = options.observer, (total, seqlen)
        nll_N: Numbers = measure_nll(
            model.module,
            windows_NT,
            batch_size=options.batch_size,
            device=model.device,
            progress=lambda done: emit(Progress(stage=self.name, done=done, total=total)),
            hook=observer.start(self.name, self.fingerprint, shape, emit) if observer else None,
        ).numpy()
        return nll_N

    def _measure_rolled(
        self, windows: RequestBatch, model: LoadedModel, options: EvalOptions, emit: Emit
    ) -> Numbers:
        if options.observer is not None:
            message = (
                "KL to the baseline is measured on windows that do not overlap, without --stride"
            )
            emit(Notice(kind="skipped", subject=self.name, message=message))
        scores = score_requests(
            model, windows, batch_size=options.batch_size, name=self.name, emit=emit
        )
        nll_N: Numbers = -scores.loglikelihood.numpy()
        return nll_N

    def _count(self, emit: Emit) -> Iterator[Count]:
        """Yield what each window's nll is divided by."""
        yield "perplexity", "per token", "exp", self.last_N - self.first_N
        counts = count_words_and_bytes(self.tokens, self.first_N, self.last_N)
        if counts is None or not counts[0].any():
            why = "the tokenizer gives no offsets" if counts is None else "no whole word"
            message = f"no word perplexity and no bits per byte: {why}"
            emit(Notice(kind="skipped", subject=self.name, message=message))
            return
        words, size = counts
        yield "word_perplexity", "per word", "exp", words
        yield "bits_per_byte", "bits per byte", "bits", size


def prepare_text(spec: ModelSpec, name: str, options: EvalOptions, emit: Emit) -> PreparedText:
    """Read, tokenise and cut the text called `name`.

    Raises:
        DataError: the text is missing or malformed.
        EvaluationError, DataError: as `prepare_windows`.
    """
    return prepare_windows(spec, name, _load(name, options), options, emit)


def prepare_windows(
    spec: ModelSpec, name: str, text: Text, options: EvalOptions, emit: Emit
) -> PreparedText:
    """Tokenise a text and cut it into windows, for the task `name`.

    Raises:
        EvaluationError: no tokenizer, `seqlen` beyond the model's positions, a stride beyond it.
        DataError: fewer than two tokens.
    """
    for note in text.notes:
        emit(Notice(kind="fallback", subject=name, message=note))
    if spec.tokenizer is None:
        raise EvaluationError(f"{spec.source} has no tokenizer, and {name} needs one")
    tokens, bos = tokenize(spec.tokenizer, text.text), find_bos(spec.tokenizer)
    check_token_ids(spec, [tokens.ids])
    if bos is None and options.bos == "first":
        message = "the tokenizer adds no BOS, so --bos first changes nothing"
        emit(Notice(kind="info", subject=name, message=message))
    seqlen = _fit(choose_seqlen(spec, name, options.seqlen, emit), tokens, text, emit)
    if name == "c4" and options.limit is None:
        options = replace(options, limit=float(C4_WINDOWS))
    every = bos if options.bos == "every" else None
    if options.stride:
        prepared = _roll(name, text, tokens, seqlen, every, options, emit)
    else:
        prepared = _cut(name, text, tokens, seqlen, every, options)
    return replace(prepared, protocol=f"{prepared.protocol}, {_describe_bos(bos, every)}")


def _describe_bos(bos: int | None, every: int | None) -> str:
    if bos is None:
        return "no BOS"
    return "BOS in the first only" if every is None else "BOS in each"


def _load(name: str, options: EvalOptions) -> Text:
    places: dict[str, Any] = {
        "data_dir": options.data_dir,
        "cache_dir": options.cache_dir,
        "token": options.token,
    }
    if name in CORPORA:
        return load_corpus(name, **places)
    return load_text(name.removeprefix(TEXT_PREFIX), "evaluation", **places)


def _cut(
    name: str, text: Text, tokens: Tokens, seqlen: int, bos: int | None, options: EvalOptions
) -> PreparedText:
    """Cut windows that do not overlap; with a `bos`, which `tokens` begin with, each has one."""
    ids = tokens.ids if bos is None else tokens.ids[1:]
    windows_NT = cut_windows(ids, seqlen, bos)
    windows_NT = windows_NT[: options.count(len(windows_NT))]
    # with a BOS, what precedes a window's predictions is the last token of the window before
    first_N = np.arange(len(windows_NT)) * (seqlen if bos is None else seqlen - 1)
    return PreparedText(
        name=name,
        text=text,
        tokens=tokens,
        seqlen=seqlen,
        windows=windows_NT,
        first_N=first_N,
        last_N=first_N + seqlen - 1,
        fingerprint=digest_tokens(windows_NT),
        protocol=f"windows: {len(windows_NT):,} of {seqlen:,} tokens",
    )


def _roll(
    name: str,
    text: Text,
    tokens: Tokens,
    seqlen: int,
    bos: int | None,
    options: EvalOptions,
    emit: Emit,
) -> PreparedText:
    """Roll windows over the text; its first token is what the second is predicted from.

    With a `bos` it stands in the place of the first token of every context.
    """
    length = min(seqlen, tokens.ids.numel() - 1)
    stride = check_stride(options.stride, length)
    prefix, *ids = tokens.ids.tolist()
    windows = roll_windows(ids, prefix, length, stride)
    windows = windows[: options.count(len(windows))]
    if bos is not None:
        windows = [replace(window, context=(bos, *window.context[1:])) for window in windows]
    last_N = np.cumsum([len(window.continuation) for window in windows])
    rows = [torch.tensor(window.context + window.continuation) for window in windows]
    return PreparedText(
        name=name,
        text=text,
        tokens=tokens,
        seqlen=seqlen,
        windows=batch_requests(windows, length=length, name=name, emit=emit),
        first_N=np.concatenate([[0], last_N[:-1]]),
        last_N=last_N,
        fingerprint=digest_tokens(rows),
        protocol=f"rolling windows: {len(windows):,} of {length:,} tokens, stride {stride:,}",
    )


def choose_seqlen(spec: ModelSpec, name: str, asked: int | None, emit: Emit) -> int:
    """Choose the window: as asked, else 2,048, or the model's positions if fewer (a Notice).

    Raises:
        EvaluationError: more was asked than the model has positions.
    """
    most = spec.max_positions
    if asked is not None and most is not None and asked > most:
        raise EvaluationError(
            f"--seqlen {asked} is more than the {most} positions of {spec.source}",
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
        raise DataError(f"{text.origin} has {found} tokens, and perplexity needs at least two")
    if found < seqlen:
        message = f"one window of {found} tokens, the whole text, instead of {seqlen}"
        emit(Notice(kind="fallback", subject=text.source, message=message))
    return min(found, seqlen)
