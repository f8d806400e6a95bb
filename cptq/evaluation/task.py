"""What a task is: `prepare` reads and checks its data, `measure` runs a model on what was prepared.

Preparing takes a model's config and tokenizer and none of its weights. All tasks of a run are
prepared before anything is measured, so that an error in the data costs no minute of measuring, and
the leak check (`cptq.evaluation.leak_check`) reads the very texts that the model will see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.evaluation import TASKS, TEXT_PREFIX, check_task, check_task_kind
from cptq.evaluation.split_model import Chunk
from cptq.types import Emit, EvalResult

#: makes results of the nll of each window (windows,)
Build = Callable[[np.ndarray[Any, Any]], list[EvalResult]]


class Observer(Protocol):
    """Reads the hidden states of every text that is measured (`cptq.evaluation.divergence`)."""

    def start(
        self, name: str, fingerprint: str, shape: tuple[int, int], emit: Emit
    ) -> Callable[[Chunk], bool] | None:
        """Return what to call with each chunk of the text `name`; None: nothing.

        It returns whether it takes a chunk over (`perplexity.measure_nll`); all of a text, or none.

        `shape` is (windows, tokens), `fingerprint` that of the windows.
        """

    def take_over(self, build: Build) -> bool:
        """Return whether the text started last was taken over; then `build` is called later."""

    def read_results(self, like: EvalResult) -> list[EvalResult]:
        """Return what was found on the text started last, described as `like` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How to prepare and measure.

    `batch_size`: at most this many rows in one forward; perplexity takes fewer where windows are
    long. It changes no result. `limit`: the first samples only (windows of a text, sentences of a
    labelled set); up to 1 a share, above 1 a count. `seqlen`: tokens of a window, None = 2,048 or
    what the model can take. `bos`: which windows of a text begin with the tokenizer's BOS, "every"
    or the "first". `stride`: windows roll over a text and each predicts this many tokens, None =
    windows that do not overlap. `max_length`: tokens at which a sentence is cut, None = the
    model's. `observer`: records a baseline's outputs on a text, or compares the model's with them.
    """

    batch_size: int = 8
    limit: float | None = None
    seqlen: int | None = None
    bos: str = "every"
    stride: int | None = None
    max_length: int | None = None
    data_dir: Path | None = None
    cache_dir: Path | None = None
    token: str | None = field(default=None, repr=False)
    seed: int = 0
    trust_remote_code: bool = False
    observer: Observer | None = None

    def count(self, total: int) -> int:
        """Count the samples to take of `total` (at least one)."""
        if self.limit is None:
            return total
        wanted = ceil(self.limit * total) if self.limit <= 1 else int(self.limit)
        return max(1, min(wanted, total))


class PreparedTask(Protocol):
    """A task with its data read and checked, ready to be measured by the model it is for.

    `fingerprint` identifies the samples as the model will get them (None: there are none).
    `documents` are the texts to be measured, by the name they are reported under; empty for a
    task without text.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def documents(self) -> Mapping[str, Sequence[str]]: ...

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Return one result per metric, the task's main metric first.

        Raises:
            EvaluationError: the model's outputs are not finite.
        """


#: what `cptq.evaluation.TASKS` holds: (model without weights, the task's name, options, emit)
Prepare = Callable[[ModelSpec, str, EvalOptions, Emit], PreparedTask]


def prepare_task(spec: ModelSpec, task: str, options: EvalOptions, emit: Emit) -> PreparedTask:
    """Read and check the data of a task, as this model is to be measured by it.

    Args:
        spec: the model without its weights; a `LoadedModel` is one too.
        task: a name in `cptq.evaluation.TASKS`, `text:PATH`, or the path of a text file.

    Raises:
        UnknownNameError: no such task.
        EvaluationError: the model cannot do it (its kind, its labels, no tokenizer).
        DataError: the data is missing, empty or malformed.
    """
    check_task_kind(task, spec.kind)
    name = check_task(task)
    # a text file is prepared as wikitext is
    prepare = cast(Prepare, TASKS.get("wikitext" if name.startswith(TEXT_PREFIX) else name))
    return prepare(spec, name, options, emit)


def evaluate(model: LoadedModel, task: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Prepare a task for a loaded model and measure it.

    Raises:
        UnknownNameError, EvaluationError, DataError: as `prepare_task` and `PreparedTask.measure`.
    """
    return prepare_task(model, task, options, emit).measure(model, options, emit)
