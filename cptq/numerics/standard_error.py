"""The standard error of a mean over rows that come in windows.

Tokens of one window share a context and a subject, so their values rise and fall together. Taken as
independent they make an error look smaller than it is (2.8 times on one model). The independent
samples are the windows: the mean over all rows is a ratio of two sums over windows,

    m = sum_w S_w / sum_w n_w,      SE^2 = W / (W - 1) sum_w (S_w - m n_w)^2 / (sum_w n_w)^2

with S_w the sum and n_w the number of rows of window w (delta method of a ratio estimate: Cochran,
Sampling Techniques, section 6.4; equal to the error of the mean of window means where all windows
are as long). Rows that are samples of their own (sentences) are windows of one row.

Limits: windows of one document still share it; with few windows the error is itself uncertain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_standard_error(value_R: Tensor, window_R: Tensor) -> float:
    """Return the standard error of the mean of `value_R`; 0 where there is one window.

    Args:
        value_R: rows (rows,), float.
        window_R: the window of each, integers from 0 on (rows,).
    """
    windows = int(window_R.max()) + 1 if len(window_R) else 0
    if windows < 2:
        return 0.0
    value_R = value_R.double()
    excess_W = torch.zeros(windows, dtype=torch.float64)
    excess_W.index_add_(0, window_R.cpu(), (value_R - value_R.mean()).cpu())
    return math.sqrt(float(excess_W.square().sum()) * windows / (windows - 1)) / len(value_R)
