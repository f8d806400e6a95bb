"""Answers that changed between right and wrong from a baseline to a model.

Dutta et al. 2024, "Accuracy is not all you need": two models of the same accuracy can be right
about different questions. A flip is an answer that was right and is wrong, or the other way round;
their share is at least the difference of the two accuracies. Its standard error is that of a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cptq.types import EvalResult, SamplePairs, SampleRatios
from cptq.types.samples import build_ratios

#: metrics that are a share of right answers
_SHARES = ("acc", "acc_norm", "accuracy")


def with_flips(
    results: Sequence[EvalResult], baseline: Sequence[EvalResult]
) -> tuple[EvalResult, ...]:
    """The results, and after each accuracy the share of flips where the baseline has the same."""
    known = {(r.task, r.version, r.metric, r.data_fingerprint): r for r in baseline}
    found: list[EvalResult] = []
    for result in results:
        found.append(result)
        key = (result.task, result.version, result.metric, result.data_fingerprint)
        if result.metric in _SHARES and key in known:
            found += _flips(result, known[key])
    return tuple(found)


def _flips(result: EvalResult, baseline: EvalResult) -> list[EvalResult]:
    ours, theirs = right(result), right(baseline)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return []
    flipped = (ours != theirs).astype(np.float64)
    count = len(flipped)
    stderr = float(flipped.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    name = "flips" if result.metric != "acc_norm" else "flips_norm"
    return [
        replace(
            result,
            metric=name,
            value=float(flipped.mean()),
            stderr=stderr,
            higher_is_better=False,
            per_sample=build_ratios(flipped),
        )
    ]


def right(result: EvalResult) -> NDArray[np.bool_] | None:
    """Whether each sample was answered rightly; None if the result does not hold that."""
    samples = result.per_sample
    if isinstance(samples, SampleRatios) and not samples.denominators:
        return np.asarray(np.array(samples.numerators) == 1)
    if isinstance(samples, SamplePairs):
        return np.asarray(np.array(samples.labels) == np.array(samples.predictions))
    return None
