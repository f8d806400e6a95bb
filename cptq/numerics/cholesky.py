"""The Cholesky factor of a symmetric matrix and its inverse, the same bits with any threads.

LAPACK's parallel `potrf` divides a matrix by the number of threads, and its sums come out in
another order with each: the codes of a compressed model would depend on the machine. Here the
matrix is cut into panels of `PANEL` columns (Golub & Van Loan, section 4.2.9, right-looking):

    A_jj = L_jj L_jj^T          a panel's own square, too small for LAPACK to divide
    L_ij = A_ij L_jj^-T         a triangular solve
    A_ik -= L_ij L_kj^T         products over `PANEL` columns, for the squares right of the panel

Solves and products give each result from sums in one order, whatever the threads (measured with MKL
from 96 to 2,304 columns).

Cost: n^3 / 3 multiply-adds in place, and n^3 / 6 for the inverse, beside a panel. Limits: on a CPU;
a GPU has its own routine.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: columns of a panel; from 256 on LAPACK uses threads
PANEL = 128
#: columns whose update is one product: what lies above the diagonal is computed for nothing
WIDE = 512


def factor_in_place(A_II: Tensor) -> Tensor | None:
    """Return L, lower triangular with A = L L^T, in the memory of A; None if A has no factor.

    Args:
        A_II: symmetric, of which the lower half is read.
    """
    if A_II.device.type != "cpu":
        L_II, failed = torch.linalg.cholesky_ex(A_II)
        return None if int(failed) else L_II
    size = len(A_II)
    for start in range(0, size, PANEL):
        end = min(start + PANEL, size)
        square, failed = torch.linalg.cholesky_ex(A_II[start:end, start:end])
        if int(failed) or not bool(torch.isfinite(square).all()):
            return None
        A_II[start:end, start:end] = square
        below = A_II[end:, start:end]
        if len(below):
            solved = torch.linalg.solve_triangular(square.T, below, upper=True, left=False)
            below.copy_(solved)
            for left in range(end, size, WIDE):
                right = min(left + WIDE, size)
                A_II[left:, left:right].addmm_(
                    solved[left - end :], solved[left - end : right - end].T, alpha=-1
                )
    return A_II.tril_()


def invert_in_place(L_II: Tensor) -> Tensor:
    """Return L^-1, lower triangular, in the memory of L.

    Panel by panel from the left: column j of the inverse needs L from row and column j on alone.
    """
    size = len(L_II)
    for start in range(0, size, WIDE):
        end = min(start + WIDE, size)
        unit = torch.zeros(size - start, end - start, dtype=L_II.dtype, device=L_II.device)
        unit.diagonal().fill_(1)
        solved = torch.linalg.solve_triangular(L_II[start:, start:], unit, upper=False)
        L_II[start:, start:end] = solved
    return L_II
