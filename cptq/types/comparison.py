"""A model's results joined with a baseline's, and how certain each difference is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cptq.types.result import EvalResult

Verdict = Literal["better", "worse", "equal", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """A result minus the baseline's, sample by sample.

    `interval` (low, high) holds the true difference with `level` of confidence; `p_value` is of
    "there is none", two-sided. Of answers that are right or wrong, `lost` counts those that only
    the baseline has right, `gained` those that only the result has (None for other metrics).
    """

    task: str
    version: int
    metric: str
    higher_is_better: bool
    difference: float
    interval: tuple[float, float]
    level: float
    p_value: float
    samples: int
    method: str
    lost: int | None = None
    gained: int | None = None

    @property
    def at_most_worse(self) -> float:
        """By how much the result is worse at most, with `level` of confidence; never below 0."""
        return max(0.0, -self.interval[0] if self.higher_is_better else self.interval[1])

    @property
    def verdict(self) -> Verdict:
        """ "equal": not a sample differs; "undecided": too few samples to separate the two."""
        if not any(self.interval) or self.lost == self.gained == 0:
            return "equal"
        if not self.p_value < 1 - self.level:
            return "undecided"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedResult:
    """One result, and the baseline's of the same task, version and metric (None: there is none).

    `paired` is their difference sample by sample. `mismatch` states why two results that should
    have one cannot be paired.
    """

    result: EvalResult
    baseline: EvalResult | None = None
    paired: PairedDifference | None = None
    mismatch: str | None = None

    @property
    def same_samples(self) -> bool:
        """Whether both results hold values of the same samples."""
        other = self.baseline
        return other is not None and _explain_other_samples(self.result, other) is None

    @property
    def difference(self) -> float | None:
        """Result minus baseline."""
        return None if self.baseline is None else self.result.value - self.baseline.value

    @property
    def verdict(self) -> str:
        """The paired test's verdict, else "better", "worse" or "same"; "" without a baseline."""
        if self.paired is not None:
            return self.paired.verdict
        if self.difference is None or self.difference != self.difference:
            return ""
        if self.difference == 0:
            return "same"
        return "better" if (self.difference > 0) == self.result.higher_is_better else "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All results of a model, each beside the baseline's; `baseline` are all of the baseline's."""

    rows: tuple[ComparedResult, ...] = ()
    baseline: tuple[EvalResult, ...] = ()

    @property
    def results(self) -> tuple[EvalResult, ...]:
        """The model's results."""
        return tuple(row.result for row in self.rows)

    @property
    def paired(self) -> tuple[PairedDifference, ...]:
        """The differences of all results that could be paired."""
        return tuple(row.paired for row in self.rows if row.paired is not None)


def join_results(results: Iterable[EvalResult], baseline: Iterable[EvalResult] = ()) -> Comparison:
    """Join each result with the baseline's of the same task and metric.

    A baseline's result of another version of the task is not comparable: it becomes a `mismatch`.
    """
    others = tuple(baseline)
    known = {(other.task, other.metric): other for other in others}
    rows = tuple(_join(result, known.get((result.task, result.metric))) for result in results)
    return Comparison(rows=rows, baseline=others)


def _join(result: EvalResult, other: EvalResult | None) -> ComparedResult:
    if other is None:
        return ComparedResult(result=result)
    same_version = result.version == other.version
    return ComparedResult(
        result=result,
        baseline=other if same_version else None,
        mismatch=_explain_mismatch(result, other) if result.per_sample is not None else None,
    )


def _explain_mismatch(result: EvalResult, other: EvalResult) -> str | None:
    """Why two results of a task cannot be compared sample by sample; None: they can."""
    if result.version != other.version:
        return f"versions {result.version} and {other.version} of the task"
    reason = _explain_other_samples(result, other)
    if reason is not None:
        return reason
    if not (math.isfinite(result.value) and math.isfinite(other.value)):
        return "a value is not finite"
    return "one sample alone has no spread" if len(result.per_sample or ()) < 2 else None


def _explain_other_samples(result: EvalResult, other: EvalResult) -> str | None:
    mine, theirs = result.per_sample, other.per_sample
    if mine is None or theirs is None:
        return "no values of single samples were kept"
    if result.data_fingerprint is None or result.data_fingerprint != other.data_fingerprint:
        return "the samples are not the same (other data, or another tokenizer's windows)"
    if type(mine) is not type(theirs) or len(mine) != len(theirs):
        return f"{len(mine)} and {len(theirs)} samples"
    return None
