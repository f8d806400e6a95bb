"""Refuse activations and gradients that are NaN or infinite."""

from __future__ import annotations

from cptq.errors import CalibrationError


def build_not_finite_error(what: str) -> CalibrationError:
    """Return the error for `what`, a noun phrase."""
    return CalibrationError(
        f"{what} holds NaN or infinity on the calibration text",
        hint="run in --dtype float32, or check the checkpoint for damaged weights",
    )
