"""The leak check: an artifact is not to be measured on the text that it was calibrated on.

A model fitted to a text does well on that text and nowhere else. The artifact's manifest holds a
sketch of its calibration text (`cptq.data.overlap`); the texts of all prepared tasks are looked up
in it before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cptq.data.overlap import Hashes, Overlap, measure_overlap
from cptq.errors import EvaluationError
from cptq.evaluation.task import PreparedTask
from cptq.types import Emit, Notice

HINT = "calibrate on other text, or leave out --strict to be warned only"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """The text that calibrated an artifact: how to name it, and the sketch of it."""

    name: str
    sketch: Hashes


def check_leaks(
    task: PreparedTask, calibration: CalibrationText, *, strict: bool, emit: Emit
) -> None:
    """Look for the calibration text in the documents of a task; a Notice states what was found.

    Raises:
        EvaluationError: it is there, and `strict` is set.
    """
    for name, rows in task.documents.items():
        if not any(row.strip() for row in rows):
            message = "not compared with the calibration text: its documents hold no text"
            emit(Notice(kind="skipped", subject=name, message=message))
        _check(name, rows, calibration, strict, emit)


def _check(
    name: str, rows: Sequence[str], calibration: CalibrationText, strict: bool, emit: Emit
) -> None:
    found = measure_overlap(calibration.sketch, rows)
    if not found.found:
        return
    message = f"{_describe(found)} of the calibration text {calibration.name}"
    if found.leaks and strict:
        raise EvaluationError(f"{name} is measured on {message}", hint=HINT)
    if found.leaks:
        words = f"measured on {message}: the result is inflated"
        emit(Notice(kind="warning", subject=name, message=words))
    else:
        words = f"shares {message}: a common phrase, not an overlap"
        emit(Notice(kind="info", subject=name, message=words))


def _describe(found: Overlap) -> str:
    share = f"{100 * found.share:.2g}%"
    return f"passages ({found.found} of {found.kept} fingerprints, {share} of a text)"
