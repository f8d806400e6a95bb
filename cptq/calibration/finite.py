"""Notice activations and gradients that are NaN or infinite."""

from __future__ import annotations

import math

from torch import Tensor

from cptq.errors import CalibrationError


def is_finite(X: Tensor) -> bool:
    """Return whether no number is NaN or infinite; one pass, where `isfinite` takes several."""
    return X.numel() == 0 or all(math.isfinite(float(end)) for end in X.detach().aminmax())


def build_not_finite_error(what: str) -> CalibrationError:
    """Return the error for `what`, a noun phrase."""
    return CalibrationError(
        f"{what} holds NaN or infinity on the calibration text",
        hint="run in --dtype float32, or check the checkpoint for damaged weights",
    )
