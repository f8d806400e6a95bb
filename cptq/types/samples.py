"""The contribution of each sample to a result, for comparing two models on the same samples.

Two kinds cover all tasks. For a ratio of sums over independent samples (accuracy, perplexity, bits
per byte): each sample's part of both sums, value = link(sum of numerators / sum of denominators).
For other metrics (Matthews, F1, correlations): the label and prediction of each sample.

Numbers are rounded to SIGNIFICANT digits and whole ones stored as integers: the 40,430 pairs of
QQP, the largest set here, take 160 kB in eval.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Link = Literal["mean", "exp", "bits"]
#: functions from the ratio of sums to the value: identity; exp of nats; nats to bits
LINKS: Mapping[Link, Callable[[float], float]] = {
    "mean": lambda ratio: ratio,
    "exp": lambda ratio: math.exp(ratio) if ratio < 709 else math.inf,
    "bits": lambda ratio: ratio / math.log(2),
}
SIGNIFICANT = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRatios:
    """value = link(sum of `numerators` / sum of `denominators`); without denominators 1 each.

    A window of text has its summed nll in nats over its predicted tokens (words, bytes); a question
    0 or 1.
    """

    numerators: tuple[float, ...]
    denominators: tuple[float, ...] = ()
    link: Link = "mean"

    def __len__(self) -> int:
        return len(self.numerators)

    @property
    def value(self) -> float:
        """The value of the metric over these samples."""
        total = math.fsum(self.denominators) if self.denominators else len(self.numerators)
        return LINKS[self.link](math.fsum(self.numerators) / total)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePairs:
    """Label and prediction (a class or a score) of every sample."""

    labels: tuple[float, ...]
    predictions: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)


PerSample = SampleRatios | SamplePairs


def build_ratios(
    numerators: Iterable[float], denominators: Iterable[float] = (), link: Link = "mean"
) -> SampleRatios:
    """Build sample ratios from numbers or arrays, rounded to SIGNIFICANT digits."""
    return SampleRatios(
        numerators=_round_all(numerators), denominators=_round_all(denominators), link=link
    )


def build_pairs(labels: Iterable[float], predictions: Iterable[float]) -> SamplePairs:
    """Build sample pairs from numbers or arrays, rounded to SIGNIFICANT digits."""
    return SamplePairs(labels=_round_all(labels), predictions=_round_all(predictions))


def read_per_sample(data: Mapping[str, Any] | None) -> PerSample | None:
    """Read the samples of a result in eval.json.

    Raises:
        KeyError, TypeError: the data is invalid.
    """
    if data is None:
        return None
    if "labels" in data:
        return build_pairs(data["labels"], data["predictions"])
    return build_ratios(data["numerators"], data["denominators"], data["link"])


def _round_all(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(_round(float(value)) for value in values)


def _round(value: float) -> float:
    if not math.isfinite(value):
        return value
    return int(value) if value == int(value) else float(f"{value:.{SIGNIFICANT}g}")
