"""All errors of cptq. A message names the problem, the allowed values and the next step.

Every error that a user can cause is a `CptqError`; the command line prints it in one sentence and
exits with its `exit_code`. Any other exception is a bug in cptq and is reported as one.
"""

from __future__ import annotations


class CptqError(Exception):
    """Base class of all errors that cptq raises deliberately.

    Args:
        problem: what is wrong, one clause without a final full stop.
        allowed: what is accepted instead.
        hint: what to type or do next.
    """

    exit_code = 1

    def __init__(
        self, problem: str, *, allowed: str | None = None, hint: str | None = None
    ) -> None:
        self.problem = problem
        self.allowed = allowed
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        parts = [self.problem]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)


class UsageError(CptqError):
    """An option, name or value on the command line or in a config file is invalid."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not in a registry."""


class ModelError(CptqError):
    """The checkpoint is missing, unreadable or unsupported."""


class DataError(CptqError):
    """Calibration or evaluation data is missing, empty or malformed."""


class CalibrationError(CptqError):
    """The calibration data is insufficient, for example because it has too few tokens."""


class BudgetError(UsageError):
    """A target is invalid, or no plan meets it."""


class PlanError(CptqError):
    """A plan or a sensitivity table belongs to another model or is outdated."""


class CompressionError(CptqError):
    """A layer could not be compressed."""


class ArtifactError(CptqError):
    """An artifact cannot be written, read or verified."""


class OutputExistsError(ArtifactError):
    """The output exists and `--overwrite` was not given."""

    exit_code = 2


class ResumeError(UsageError):
    """Another run is writing the output, or its finished steps cannot be resumed as asked."""


class EvaluationError(CptqError):
    """A task cannot be run on this model."""


class ProcessError(CptqError):
    """Another process of the same run has failed or died.

    `speaker`: the index of the process that says so.
    """

    def __init__(self, problem: str, *, hint: str | None = None, speaker: int = 0) -> None:
        super().__init__(problem, hint=hint)
        self.speaker = speaker


_KEPT = "_cptq_kept"


def mark_kept(error: BaseException, steps: int, place: str) -> None:
    """Say on an error, of whatever kind, how many finished steps `--resume` can go on from."""
    setattr(error, _KEPT, steps)
    if steps:
        error.add_note(f"{steps} finished steps are kept in {place}: resume=True goes on from them")


def count_kept(error: BaseException) -> int | None:
    """Return what `mark_kept` said; None where nothing did."""
    found: int | None = getattr(error, _KEPT, None)
    return found


def copy_kept(error: BaseException, to: BaseException) -> None:
    """Say on another error what `mark_kept` said on the one that it replaces."""
    if count_kept(error) is not None:
        setattr(to, _KEPT, count_kept(error))
    for note in getattr(error, "__notes__", ()):
        to.add_note(note)
