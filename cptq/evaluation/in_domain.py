"""Say beside a perplexity that the model was calibrated on the same corpus.

Quantization fits a model to its calibration text. On another part of that corpus it loses less than
on any other text, so an in-domain perplexity flatters, and two models are compared fairly only if
both were calibrated in-domain or neither. Corpora are told apart by name
(`cptq.data.corpus_names`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cptq.data.corpus_names import name_corpus
from cptq.evaluation import TEXT_PREFIX
from cptq.types import EvalResult


def mark_in_domain(results: Iterable[EvalResult], source: str | None) -> list[EvalResult]:
    """Mark the results on text of the corpus `source`, which calibrated the model (None: none)."""
    return [
        _mark(result, source) if source is not None and _is_of(result, source) else result
        for result in results
    ]


def _is_of(result: EvalResult, source: str) -> bool:
    task = name_corpus(result.task.removeprefix(TEXT_PREFIX))
    return result.protocol is not None and task == name_corpus(source)


def _mark(result: EvalResult, source: str) -> EvalResult:
    note = f"in-domain: the model was calibrated on {source}"
    return replace(result, in_domain=True, notes=(*result.notes, note))
