"""Word perplexity and bits per byte as lm-evaluation-harness computes them.

Every document is scored by itself, detokenized, each of its tokens predicted once by windows that
roll over it (`cptq.evaluation.continuations`), and normalised by the words (pieces between white
space, empty ones at the ends included) and UTF-8 bytes of the document as it was:

    word perplexity = exp( sum nll / sum words ),   bits per byte = sum nll / (sum bytes * ln 2)

Token perplexity is reported beside them. Standard errors take documents as the independent samples.
`wikitext-rolling` is the harness's task `wikitext` (version 2), `c4-rolling` its `c4` (version 0).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.data.corpora import Pages, detokenize, load_pages
from cptq.evaluation.continuations import (
    Encoder,
    RequestBatch,
    batch_requests,
    check_stride,
    choose_length,
    roll_windows,
    score_requests,
)
from cptq.evaluation.perplexity import Count, build_text_results
from cptq.evaluation.task import EvalOptions
from cptq.types import Emit, EvalResult, digest

VERSIONS = {"wikitext-rolling": 2, "c4-rolling": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPages:
    """Documents and their windows: `sizes` windows of each document, and its `tokens`."""

    name: str
    pages: Pages
    requests: RequestBatch
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    stride: int
    fingerprint: str

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """The documents as they were."""
        return {self.name: self.pages.documents}

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Measure word perplexity, bits per byte and token perplexity over whole documents.

        Raises:
            EvaluationError: an output is not finite.
        """
        begin = time.perf_counter()
        scores = score_requests(
            model, self.requests, batch_size=options.batch_size, name=self.name, emit=emit
        )
        nll_N = np.array([-float(part.sum()) for part in scores.loglikelihood.split(self.sizes)])
        seconds, length = time.perf_counter() - begin, self.requests.length
        return build_text_results(
            nll_N,
            self._count(),
            task=self.name,
            version=VERSIONS[self.name],
            seconds=seconds,
            seqlen=length,
            tokens=sum(self.tokens),
            data_source=self.pages.origin,
            data_sha256=self.pages.sha256,
            data_fingerprint=self.fingerprint,
            protocol=(
                f"documents by themselves, rolling windows of {length:,} tokens, stride "
                f"{self.stride:,}, BOS (else EOS) before each document"
            ),
        )

    def _count(self) -> Iterator[Count]:
        """Yield what each document's nll is divided by."""
        pages = self.pages.documents
        words = np.array([len(re.split(r"\s+", page)) for page in pages])
        yield "word_perplexity", "per word", "exp", words
        size = np.array([len(page.encode()) for page in pages])
        yield "bits_per_byte", "bits per byte", "bits", size
        yield "perplexity", "per token", "exp", np.array(self.tokens)


def prepare_rolling(spec: ModelSpec, name: str, options: EvalOptions, emit: Emit) -> PreparedPages:
    """Read the documents and roll windows over each.

    Raises:
        DataError: the documents are missing or malformed.
        EvaluationError: no tokenizer, `seqlen` or `stride` out of range.
    """
    found = load_pages(
        name, data_dir=options.data_dir, cache_dir=options.cache_dir, token=options.token
    )
    documents = found.documents[: options.count(len(found.documents))]
    encoder, length = Encoder(spec, name), choose_length(spec, options.seqlen)
    stride = check_stride(options.stride, length)
    ids = [encoder.encode(detokenize(page)) for page in documents]
    windows = [roll_windows(row, encoder.prefix, length, stride) for row in ids]
    flat = (window for rows in windows for window in rows)
    return PreparedPages(
        name=name,
        pages=Pages(documents=documents, origin=found.origin),
        requests=batch_requests(flat, length=length, name=name, emit=emit),
        sizes=tuple(len(rows) for rows in windows),
        tokens=tuple(len(row) for row in ids),
        stride=stride,
        fingerprint=digest([[list(row) for row in ids], length, stride]),
    )
