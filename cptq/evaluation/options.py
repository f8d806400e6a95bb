"""What every task is given, and what a task is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.evaluation.perplexity import Witness
from cptq.types import Emit, EvalResult

#: (the task's name, the texts that it is going to measure on), before anything is measured
Watch = Callable[[str, Sequence[str]], None]


def unwatched(name: str, rows: Sequence[str]) -> None:
    """Nobody wants to know."""


class Beside(Protocol):
    """Meets the windows of every text that is measured."""

    def open(self, name: str, windows_NT: Tensor, emit: Emit) -> Witness | None:
        """What is to be shown the batches of the text `name`; None: nothing."""

    def results(self, like: EvalResult) -> list[EvalResult]:
        """What was found on the text opened last, described as `like` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How to measure.

    `batch_size`: at most this many rows in one forward; perplexity takes fewer where windows are
    long. It changes no result. `limit`: the first samples only (windows of a text, sentences of a
    labelled set); up to 1 a share, above 1 a count. `seqlen`: tokens of a window, None = 2,048 or
    what the model can take. `stride`: windows roll over a text and each predicts this many tokens,
    None = windows that do not overlap. `max_length`: tokens at which a sentence is cut, None = the
    model's. `beside`: what keeps a baseline's outputs on a text, or compares the model's with them.
    `watch` is shown the texts of every task before it measures.
    """

    batch_size: int = 8
    limit: float | None = None
    seqlen: int | None = None
    stride: int | None = None
    max_length: int | None = None
    data_dir: Path | None = None
    cache_dir: Path | None = None
    token: str | None = field(default=None, repr=False)
    seed: int = 0
    trust_remote_code: bool = False
    beside: Beside | None = None
    watch: Watch = unwatched

    def count(self, total: int) -> int:
        """How many of `total` samples to take (at least one)."""
        if self.limit is None:
            return total
        wanted = ceil(self.limit * total) if self.limit <= 1 else int(self.limit)
        return max(1, min(wanted, total))


#: (model, the task's name, options, emit) -> one result per metric, the main one first
Task = Callable[[LoadedModel, str, EvalOptions, Emit], list[EvalResult]]
