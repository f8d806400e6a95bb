"""Word perplexity and bits per byte as lm-evaluation-harness gives them.

Every document is scored by itself, detokenized, each of its tokens predicted once (see
cptq.evaluation.rolling), and normalised by the words (pieces between white space, empty ones at the
ends included) and UTF-8 bytes of the document as it was:

    word perplexity = exp( sum nll / sum words ),   bits per byte = sum nll / (sum bytes * ln 2)

Token perplexity stands beside them. Standard errors take documents as the independent samples.
`wikitext-rolling` is the harness's task `wikitext` (version 2), `c4-rolling` its `c4` (version 0).
"""

from __future__ import annotations

import re
import time

import numpy as np

from cptq.checkpoint.model import LoadedModel
from cptq.data.pages import Pages, detokenize, load_pages
from cptq.evaluation.continuations import Encoder, context_length, score
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.perplexity import linked, ratio
from cptq.evaluation.rolling import checked_stride, rolling_windows
from cptq.types import Emit, EvalResult, digest
from cptq.types.samples import Link, build_ratios

VERSIONS = {"wikitext-rolling": 2, "c4-rolling": 0}


def rolling(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Word perplexity, bits per byte and token perplexity over whole documents.

    Raises:
        DataError: the documents are nowhere to be had, or malformed.
        EvaluationError: no tokenizer, `seqlen` or `stride` out of range, outputs not finite.
    """
    begin = time.perf_counter()
    found = load_pages(
        name, data_dir=options.data_dir, cache_dir=options.cache_dir, token=options.token
    )
    pages = Pages(
        documents=found.documents[: options.count(len(found.documents))], origin=found.origin
    )
    options.watch(name, pages.documents)
    encoder, length = Encoder(model, name), context_length(model, options.seqlen)
    stride = checked_stride(options.stride, length)
    ids = [encoder.text(detokenize(page)) for page in pages.documents]
    windows = [rolling_windows(row, encoder.prefix, length, stride) for row in ids]
    scores = score(
        model,
        [window for rows in windows for window in rows],
        length=length,
        batch_size=options.batch_size,
        name=name,
        emit=emit,
    )
    sizes = [len(rows) for rows in windows]
    nll_N = np.array([-float(part.sum()) for part in scores.loglikelihood.split(sizes)])
    seconds = time.perf_counter() - begin
    return [
        EvalResult(
            task=name,
            version=VERSIONS[name],
            metric=metric,
            value=estimate.value,
            stderr=estimate.stderr,
            unit=unit,
            higher_is_better=False,
            samples=len(nll_N),
            seconds=seconds,
            seqlen=length,
            tokens=sum(len(row) for row in ids),
            data_source=pages.origin,
            data_sha256=pages.sha256,
            data_fingerprint=digest([[list(row) for row in ids], length, stride]),
            per_sample=build_ratios(nll_N, count_N, link),
            notes=(f"rolling windows of {length} tokens, stride {stride}",),
        )
        for metric, unit, link, count_N in _counts(pages, [len(row) for row in ids])
        for estimate in (linked(ratio(nll_N, count_N), link),)
    ]


def _counts(
    pages: Pages, tokens: list[int]
) -> list[tuple[str, str, Link, np.ndarray[tuple[int], np.dtype[np.int64]]]]:
    words = np.array([len(re.split(r"\s+", page)) for page in pages.documents])
    size = np.array([len(page.encode()) for page in pages.documents])
    return [
        ("word_perplexity", "per word", "exp", words),
        ("bits_per_byte", "bits per byte", "bits", size),
        ("perplexity", "per token", "exp", np.array(tokens)),
    ]
