"""What each sample gave to a result, so that two models can be compared on the same ones.

Two kinds cover all tasks. Where a number is a ratio of sums over independent samples (accuracy,
perplexity, bits per byte), the samples' parts of both sums: value = link(sum of numerators / sum of
denominators). Where it is not (Matthews, F1, a correlation), label and prediction of each sample.

Numbers are kept to SIGNIFICANT digits, whole ones as integers: the 40,430 pairs of QQP, the largest
set here, take 160 kB in eval.json, so that no second file is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Link = Literal["mean", "exp", "bits"]
#: from the ratio of sums to the value: itself; exp of nats; nats as bits
LINKS: Mapping[Link, Callable[[float], float]] = {
    "mean": lambda ratio: ratio,
    "exp": lambda ratio: math.exp(ratio) if ratio < 709 else math.inf,
    "bits": lambda ratio: ratio / math.log(2),
}
SIGNIFICANT = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRatios:
    """value = link(sum of `numerators` / sum of `denominators`); no denominators: 1 each.

    A window of a text has its summed nll in nats over its predicted tokens (words, bytes); an
    answered question 0 or 1.
    """

    numerators: tuple[float, ...]
    denominators: tuple[float, ...] = ()
    link: Link = "mean"

    def __len__(self) -> int:
        return len(self.numerators)

    @property
    def value(self) -> float:
        """The value that these samples give."""
        whole = math.fsum(self.denominators) if self.denominators else len(self.numerators)
        return LINKS[self.link](math.fsum(self.numerators) / whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePairs:
    """Label and prediction (a class or a score) of every sample, for `metric` over all of them."""

    labels: tuple[float, ...]
    predictions: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)


PerSample = SampleRatios | SamplePairs


def build_ratios(
    numerators: Iterable[float], denominators: Iterable[float] = (), link: Link = "mean"
) -> SampleRatios:
    """Sample ratios of numbers of any kind (arrays too), rounded to SIGNIFICANT digits."""
    return SampleRatios(
        numerators=_round_all(numerators), denominators=_round_all(denominators), link=link
    )


def build_pairs(labels: Iterable[float], predictions: Iterable[float]) -> SamplePairs:
    """Sample pairs of numbers of any kind, rounded to SIGNIFICANT digits."""
    return SamplePairs(labels=_round_all(labels), predictions=_round_all(predictions))


def read_per_sample(data: Mapping[str, Any] | None) -> PerSample | None:
    """The samples of a result in eval.json.

    Raises:
        KeyError, TypeError: it is none.
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
