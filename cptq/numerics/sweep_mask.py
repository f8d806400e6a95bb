"""Choose inside the column sweep which weights go: SparseGPT's mask.

Before the sweep projects a run of columns, all earlier errors have moved their weights. Of these,
as they are now, those with the smallest

    w_ij^2 c_j,      c_j = 1 / U_jj^2,      H^-1 = U^T U

go: what the output loses by w_ij = 0 once the columns after j make up for it (Frantar & Alistarh,
SparseGPT, arXiv 2301.00774, equation 4, and its code). A run is the M neighbours of N:M, of which
N stay in every output; or 128 columns over all outputs, of which a share goes.

The share is exact: after the columns up to k, floor(drop k / in) weights have gone. Departures from
the paper's code are listed in `compression.scores.sparsegpt`.

Cost: one selection per run. Limits: a run sees only its own columns, so 128 of them each drop the
same share although some matter more; ties go by position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.masks import build_n_of_m_mask, drop_smallest

#: columns among which a share is dropped
RUN = 128


class SweepMask:
    """The mask of one sweep, filled in as it goes.

    Args:
        shape: (in, out) of the weight, in the order of the sweep.
        cost_I: c_j by position.
        drop: weights to drop in all; not looked at with `kept_of`.
        kept_of: (N, M), where N of every M positions stay.

    Attributes:
        width: columns of a run.
        mask_IO: True where a weight stays; complete after the sweep.
    """

    def __init__(
        self, shape: tuple[int, int], cost_I: Tensor, drop: int, kept_of: tuple[int, int] | None
    ) -> None:
        self._cost_I, self._drop, self._kept_of = cost_I, drop, kept_of
        self.width = kept_of[1] if kept_of else RUN
        self.mask_IO = torch.ones(shape, dtype=torch.bool, device=cost_I.device)

    def choose(self, start: int, W_BO: Tensor) -> None:
        """Choose among the columns from position `start`, whose weights are W_BO now."""
        stop, inputs = start + len(W_BO), len(self._cost_I)
        score_BO = W_BO.square() * self._cost_I[start:stop].unsqueeze(1)
        if self._kept_of is not None:
            self.mask_IO[start:stop] = build_n_of_m_mask(score_BO.T, *self._kept_of).T
            return
        drop = self._drop * stop // inputs - self._drop * start // inputs
        self.mask_IO[start:stop] = drop_smallest(score_BO, drop)
