"""What a compressed model lost on text that did not calibrate it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardMeasure:
    """One measure of both models on the same rows of text.

    `dense` is None where the measure compares the two (KL, agreement): then `value` says it all.
    `difference` is value - dense. An interval (low, high) of 95% is that of the difference where
    there is one, else that of the value; None with fewer than two windows. `dense_stderr` and
    `stderr` are standard errors over windows.
    """

    name: str
    unit: str
    value: float
    stderr: float | None
    higher_is_better: bool
    interval: tuple[float, float] | None
    dense: float | None = None
    dense_stderr: float | None = None

    @property
    def difference(self) -> float | None:
        """The compressed model's value minus the dense one's."""
        return None if self.dense is None else self.value - self.dense


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardQuality:
    """The measures of a run, the most telling first.

    `rows` are the outputs that were compared (tokens, sentences, examples), `samples` the
    independent pieces of text behind the errors, called `sample_name`. `chose_plan`: the same text
    decided between two plans, so that the values flatter the winner a little.
    `depth`: |h' - h|^2 / |h|^2 of the hidden state h before the first block and after each.
    """

    measures: tuple[GuardMeasure, ...]
    source: str
    tokens: int
    rows: int
    samples: int
    sample_name: str
    chose_plan: bool = False
    depth: tuple[float, ...] = ()
