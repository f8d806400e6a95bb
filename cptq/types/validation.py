"""Results of `analyze --validate`: scores and measured divergences, and plans compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cptq.types.plan import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One unit at one candidate: the measured divergence `truth` and every metric's score.

    `depth` is "first" or "last" for the outer 30% of the blocks, "middle" between, "outside" for
    a unit of no block. `scores` is {metric: score}.
    """

    unit: str
    candidate: Candidate
    depth: str
    role: str
    truth: float
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Rank correlation of one metric's scores with the measured divergences.

    `within`: among pairs of the same width, averaged over the widths; `pooled`: among all pairs,
    where any score that increases as bits decrease correlates well. `seconds` are those of
    measuring the metric on its own.
    """

    metric: str
    pairs: int
    spearman_within: Interval
    kendall_within: Interval
    spearman_pooled: Interval
    kendall_pooled: Interval
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTrial:
    """A whole model compressed by one plan. `metric` None: a plan that needs no scores.

    `limit_bytes` is the most that the whole file can take under the target. `stderr` is the
    standard error of `divergence`, with windows (language models) or samples as independent.
    """

    target: str
    metric: str | None
    allocator: str
    limit_bytes: int
    file_bytes: int
    effective_bits: float
    divergence: float
    stderr: float
    choices: Mapping[str, Candidate]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`output, knapsack`; the allocator alone for a plan that needs no scores."""
        return f"{self.metric}, {self.allocator}" if self.metric else self.allocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All results of a validation.

    `texts` describes the text of each use: {"fit": ..., "choose": ..., "judge": ...}. `reference`
    is the metric whose plan regret is measured against, None if its table was not measured.
    `depths` is {metric or "measured truth": {"first" | "middle" | "last": factor}}: scores of units
    at that depth relative to the average of their role and width.
    """

    unit: str
    compressor: str
    seed: int
    judge_tokens: int
    resamples: int
    texts: Mapping[str, str]
    reference: str | None
    pairs: tuple[Pair, ...]
    agreements: tuple[Agreement, ...]
    depths: Mapping[str, Mapping[str, float]]
    trials: tuple[PlanTrial, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
