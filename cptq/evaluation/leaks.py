"""The leak guard: an artifact is not to be judged on the text that it was calibrated on.

A model fitted to a text does well on that text and nowhere else. The artifact's manifest holds a
sketch of its calibration text; every task shows the guard its own text before it measures.
`look_ahead` has all of them show it first, so that a strict guard refuses before any minute is
spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from cptq.checkpoint.model import LoadedModel
from cptq.data.overlap import Overlap, decode_sketch, overlap
from cptq.errors import EvaluationError
from cptq.evaluation import TEXTLESS
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.run import evaluate
from cptq.types import Emit, Event, Notice

HINT = "calibrate on other text, or leave out --strict to be warned only"


class LeakGuard:
    """A `Watch` that compares what is evaluated with what calibrated.

    Args:
        sketch: of the calibration text, as the manifest holds it.
        calibration: how to call that text.
        strict: an overlap is an error instead of a warning.
        emit: receives the warning.
    """

    def __init__(self, sketch: str, calibration: str, *, strict: bool, emit: Emit) -> None:
        self.known = decode_sketch(sketch)
        self.calibration, self.strict, self.emit = calibration, strict, emit

    def __call__(self, name: str, rows: Sequence[str]) -> None:
        """Look for the calibration text in the rows of a task.

        Raises:
            EvaluationError: it is there, and the guard is strict.
        """
        found = overlap(self.known, rows)
        if not found.found:
            return
        message = f"{self._words(found)} of the calibration text {self.calibration}"
        if found.leaks and self.strict:
            raise EvaluationError(f"{name} is measured on {message}", hint=HINT)
        if found.leaks:
            words = f"measured on {message}: the result flatters"
            self.emit(Notice(kind="warning", subject=name, message=words))
        else:
            words = f"shares {message}: a turn of phrase, no overlap"
            self.emit(Notice(kind="info", subject=name, message=words))

    def _words(self, found: Overlap) -> str:
        share = f"{100 * found.share:.2g}%"
        return f"passages ({found.found} of {found.kept} fingerprints, {share} of a text)"


class _ShownError(Exception):
    """Leaves a task that has shown its text."""


def look_ahead(model: LoadedModel, tasks: Sequence[str], options: EvalOptions) -> None:
    """Show `options.watch` the text of every task, and measure none.

    Raises:
        EvaluationError: the guard is strict and found something.
        The errors of the tasks before they measure: missing data, no tokenizer.
    """

    def watch(name: str, rows: Sequence[str]) -> None:
        options.watch(name, rows)
        raise _ShownError

    for task in tasks:
        if task not in TEXTLESS:
            with suppress(_ShownError):
                evaluate(model, task, replace(options, watch=watch), _unheard)


def _unheard(event: Event) -> None:
    """What a task says, it says again when it measures."""
