"""Whether what flows through a model is finite, and what to say where it is not."""

from __future__ import annotations

import math

from torch import Tensor

from cptq.errors import CalibrationError


def finite(X: Tensor) -> bool:
    """Whether no number is NaN or infinite; one pass, where `isfinite` takes several."""
    return X.numel() == 0 or all(math.isfinite(float(end)) for end in X.detach().aminmax())


def not_finite(what: str) -> CalibrationError:
    """The error for `what`, a noun phrase."""
    return CalibrationError(
        f"{what} holds NaN or infinity on the calibration text",
        hint="run in --dtype float32, or check the checkpoint for damaged weights",
    )
