"""8-bit floats as a grid: e4m3 and e5m2 without a scale.

| format | exponent, fraction | largest | smallest normal | step below that |
|--------|--------------------|--------:|-----------------|-----------------|
| e4m3   | 4, 3 bits          |     448 | 2^-6            | 2^-9            |
| e5m2   | 5, 2 bits          |  57,344 | 2^-14           | 2^-16           |

A number is off by at most 1/16 (e4m3) or 1/8 (e5m2) of itself; e4m3, which has no infinity, is the
better where most weights are above 2^-8, e5m2 below. Source: Micikevicius et al., FP8 Formats for
Deep Learning, arXiv 2209.05433, section 3; rounding to nearest even as torch does it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cptq.numerics.reproducible import sum_over_rows

FORMATS: Mapping[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def round_to_float8(X: Tensor, name: str) -> Tensor:
    """Return the nearest numbers of a format, in that type; what is too large becomes its end."""
    dtype = FORMATS[name]
    most = torch.finfo(dtype).max
    return X.clamp(-most, most).to(dtype)


def measure_float8_error(X: Tensor, name: str) -> float:
    """Return |X - Q(X)|^2 / |X|^2 of rounding to nearest; 0 for zeros."""

    def compute_error(X_RI: Tensor) -> Tensor:
        return (X_RI.float() - round_to_float8(X_RI.float(), name).float()).square_()

    energy = sum_over_rows(lambda X_RI: X_RI.float().square(), X)
    lost = sum_over_rows(compute_error, X)
    return lost / energy if energy else 0.0
