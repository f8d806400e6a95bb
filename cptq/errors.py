"""One error tree. A message says what is wrong, what is allowed and what to type next.

Everything a user can cause is a `CptqError`; the command line prints it in one sentence and exits
with its `exit_code`. Anything else that escapes is a defect of cptq and is shown as one.
"""

from __future__ import annotations


class CptqError(Exception):
    """Base of every error that cptq raises on purpose.

    Args:
        problem: what is wrong, one clause without a final full stop.
        allowed: what would be accepted instead.
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
    """An option, name or value on the command line or in a config file is not acceptable."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not in a registry."""


class ModelError(CptqError):
    """The checkpoint cannot be found, read or understood."""


class DataError(CptqError):
    """Calibration or evaluation data is missing, empty or malformed."""


class CalibrationError(CptqError):
    """The calibration data cannot support what was asked (too few tokens, for example)."""


class BudgetError(UsageError):
    """A target cannot be read or cannot be met by any plan."""


class PlanError(CptqError):
    """A plan or a measurement does not belong to this model, or is out of date."""


class CompressionError(CptqError):
    """A layer could not be compressed."""


class ArtifactError(CptqError):
    """An artifact cannot be written, read or verified."""


class OutputExistsError(ArtifactError):
    """The output is already there and `--overwrite` was not given."""

    exit_code = 2


class EvaluationError(CptqError):
    """A task cannot be run on this model."""
