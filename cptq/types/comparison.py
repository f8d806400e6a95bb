"""Differences between two models on the same samples, and their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "equal", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """A result minus the baseline's, sample by sample.

    `interval` (low, high) is the confidence interval of `level`; `p_value` is two-sided, for the
    hypothesis of no difference. For answers that are right or wrong, `lost` counts those that only
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
        """How much worse the result is at most, with `level` of confidence; at least 0."""
        return max(0.0, -self.interval[0] if self.higher_is_better else self.interval[1])

    @property
    def verdict(self) -> Verdict:
        """ "equal": no sample differs; "undecided": too few samples to separate the two."""
        if not any(self.interval) or self.lost == self.gained == 0:
            return "equal"
        if not self.p_value < 1 - self.level:
            return "undecided"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"
