"""Results that have the same bits with any number of threads.

A sum over all numbers of a large tensor, and LAPACK's decompositions, are divided by the number of
threads, and so is the order in which they add. What decides about a plan or a weight, or is stored
with an artifact, is computed here instead: sums in parts of fixed size, decompositions with one
thread (the Cholesky factor, which is large, in `numerics.cholesky`). Products of matrices and sums
along one dimension need no care: each result comes from one thread.

Cost: some percent of the time of a sum; of a decomposition the speed-up by threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: numbers in a part of a sum; torch divides sums of 32,768 and more among threads
PART = 1 << 14
#: numbers of a matrix of which something is computed at once, to be summed
ROWS = 1 << 22


def compute_total(X: Tensor) -> Tensor:
    """Return the sum of all numbers of a tensor, a scalar of its type.

    A GPU divides a sum by its size alone, so there one operation gives the same bits again.
    """
    if X.device.type != "cpu":
        return X.sum()
    parts = X.reshape(-1)
    while len(parts) > PART:
        parts = torch.stack([part.sum() for part in parts.split(PART)])
    return parts.sum()


def sum_over_rows(compute: Callable[..., Tensor], *matrices: Tensor) -> float:
    """Return the total of what is computed of some rows of matrices after the other.

    Args:
        compute: takes the same rows (rows, in) of each of the matrices.
        matrices: (out, in) each.
    """
    rows = max(1, ROWS // max(1, matrices[0].shape[1]))
    parts = zip(*(matrix.split(rows) for matrix in matrices), strict=True)
    return sum(float(compute_total(compute(*part))) for part in parts)


def compute_mean(X: Tensor) -> Tensor:
    """Return the mean of all numbers of a tensor, a scalar of its type."""
    return compute_total(X) / X.numel()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
