"""What lm-evaluation-harness answers, as results of ours.

Values are the harness's, and so are standard errors where it has them. It has none of word
perplexity, byte perplexity and bits per byte; but it keeps every document's log-likelihood and
count, whose ratio of sums they are, and so they get the error of a ratio with documents as the
independent samples, as `cptq.evaluation.perplexity` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from cptq.evaluation.perplexity import linked, ratio
from cptq.types import EvalResult, digest
from cptq.types.samples import Link, SampleRatios, build_ratios

PREFIX = "lm-eval/"
_UNITS = {
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits per byte",
    "perplexity": "per word",
    "acc": "of questions",
    "acc_norm": "of questions",
}
_LOWER = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
#: metrics that are a ratio of sums over documents -> what becomes of the ratio
_SUMMED: Mapping[str, Link] = {
    "word_perplexity": "exp",
    "byte_perplexity": "exp",
    "bits_per_byte": "bits",
}


def harness_results(answer: Mapping[str, Any], seconds: float) -> list[EvalResult]:
    """The harness's numbers as ours; a group's own line, which has no samples, comes along."""
    found = []
    for task, values in answer["results"].items():
        samples = answer.get("samples", {}).get(task, [])
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            parts = _per_sample(samples, metric, float(value))
            stated = values.get(f"{metric}_stderr,{filtered}")
            found.append(
                EvalResult(
                    task=f"{PREFIX}{task}",
                    version=_version(answer.get("versions", {}).get(task)),
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=_stderr(stated, parts),
                    unit=_UNITS.get(metric, ""),
                    higher_is_better=_higher(answer, task, metric),
                    samples=_count(answer, task, samples),
                    seconds=seconds,
                    data_source="lm-evaluation-harness",
                    data_fingerprint=_fingerprint(samples),
                    per_sample=parts,
                    notes=(f"lm-eval {_release()}",),
                )
            )
    return found


def _version(stated: Any) -> int:
    """The harness's versions are 1.0 and the like, or words where a task has none."""
    return int(stated) if isinstance(stated, int | float) else 0


def _higher(answer: Mapping[str, Any], task: str, metric: str) -> bool:
    stated = answer.get("higher_is_better", {}).get(task, {}).get(metric)
    return bool(stated) if stated is not None else metric not in _LOWER


def _count(answer: Mapping[str, Any], task: str, samples: Sequence[Any]) -> int:
    counted = answer.get("n-samples", {}).get(task, {}).get("effective")
    return int(counted) if isinstance(counted, int) else len(samples)


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Of the documents as the harness hashed them; None where it kept no samples."""
    hashes = [str(sample.get("doc_hash", "")) for sample in samples]
    return digest(hashes) if hashes and all(hashes) else None


def _per_sample(
    samples: Sequence[Mapping[str, Any]], metric: str, value: float
) -> SampleRatios | None:
    """Each document's part, where the value is the mean or the ratio that these parts give."""
    values = [sample.get(metric) for sample in samples]
    if values and all(isinstance(item, int | float) for item in values):
        found = build_ratios([float(item) for item in values if item is not None])
    elif metric in _SUMMED and values and all(map(_is_pair, values)):
        pairs = [item for item in values if item is not None]
        found = build_ratios(
            [-float(a) for a, _ in pairs], [float(b) for _, b in pairs], _SUMMED[metric]
        )
    else:
        return None
    return found if abs(found.value - value) < 1e-6 * max(1.0, abs(value)) else None


def _is_pair(item: Any) -> bool:
    """(log-likelihood, count) of a document."""
    return isinstance(item, Sequence) and len(item) == 2


def _stderr(stated: Any, parts: SampleRatios | None) -> float | None:
    """The harness's standard error; of the summed metrics it has none, and ours is a ratio's."""
    if isinstance(stated, int | float):
        return float(stated)
    if parts is None or not parts.denominators:
        return None
    sums = ratio(np.array(parts.numerators), np.array(parts.denominators))
    return linked(sums, parts.link).stderr


def _release() -> str:
    version: str = import_module("importlib.metadata").version("lm-eval")
    return version
