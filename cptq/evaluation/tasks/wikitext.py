"""Perplexity on the test part of WikiText-2 raw (see cptq.data.wikitext for its exact text)."""

from __future__ import annotations

from cptq.checkpoint.model import LoadedModel
from cptq.data import load_text
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.tasks.text import measure_text
from cptq.types import Emit, EvalResult


def wikitext(model: LoadedModel, name: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Perplexity by the GPTQ protocol, word perplexity and bits per byte.

    Raises:
        DataError: WikiText-2 is nowhere to be had; no other text stands in for it.
    """
    text = load_text(
        "wikitext",
        "evaluation",
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    return measure_text(model, name, text, options, emit)
