"""Perplexity by the GPTQ protocol on WikiText-103, Penn Treebank and C4 (see cptq.data.corpora)."""

from __future__ import annotations

from dataclasses import replace

from cptq.checkpoint.model import LoadedModel
from cptq.data.corpora import C4_WINDOWS, load_corpus
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.tasks.text import measure_text
from cptq.types import Emit, EvalResult


def corpus(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity, word perplexity and bits per byte; `name` in `CORPORA`.

    Raises:
        DataError: the corpus is nowhere to be had; no other text stands in for it.
    """
    text = load_corpus(
        name, data_dir=options.data_dir, cache_dir=options.cache_dir, token=options.token
    )
    if name == "c4" and options.limit is None:
        options = replace(options, limit=float(C4_WINDOWS))
    return measure_text(model, name, text, options, emit)
