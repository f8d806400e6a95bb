"""Compute the layer Hessian H = 2/n X^T X and the factor that the column sweep needs.

For one linear y = x W^T the squared output error of a change dW is tr(dW H dW^T) / 2 per token,
whatever the layer (Hassibi & Stork 1992; GPTQ, arXiv 2210.17323, section 3.1). The sweep needs U,
the upper Cholesky factor of H^-1 = U^T U: row j of U / U_jj is how the columns
that follow best compensate for an error in column j.

Here H is X^T X / n, without the factor 2, on which no result depends. Dead inputs (H_jj = 0 on the
calibration text) get a share of the mean diagonal of the others, by default all of it (GPTQ's code:
1, which ties the damping to the activations' scale): they then neither compensate nor need
compensation. Damping adds a share of that mean; if the
factorization fails it grows tenfold up to `MOST_DAMPING`, and `factor_damped_inverse` returns the
damping used, for the report.

Cost: n * in^2 multiply-adds per batch, less a third of them: X^T X is symmetric, so it is summed
in panels of columns, each from its diagonal on. Then in^3 / 3 for the factor and in^3 / 6 for its
inverse, both in the memory of one copy of H. float32 throughout; products of float16 activations
are never summed in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.cholesky import factor_in_place, invert_in_place
from cptq.numerics.finite import is_finite
from cptq.numerics.pairwise import MatrixSum

#: largest damping that is tried
MOST_DAMPING = 1.0
#: panels that a second moment is summed in: 0.63 of the multiply-adds, 0.68 of the time
PANELS = 4
#: features of the narrowest panel
LEAST_PANEL = 64
#: rows from either end that are exchanged at once
FLIPPED = 256


class SecondMoment(MatrixSum):
    """Running mean of x x^T over tokens; `mean_II` is H, `tokens` how many rows went in."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        # in panels of columns, of which the part left of the diagonal stays 0
        self._starts = range(0, features, max(LEAST_PANEL, -(-features // PANELS)))

    def add(self, x_TI: Tensor) -> None:
        """Add rows (tokens, in)."""
        x_TI, upper_II = x_TI.float(), self.open()
        for start in self._starts:
            end = start + self._starts.step
            upper_II[start:end, start:].addmm_(x_TI[:, start:end].T, x_TI[:, start:])
        self.tokens += x_TI.shape[0]

    @property
    def mean_II(self) -> Tensor:
        """H, as a matrix of its own."""
        return self._mirror(self.open() / max(self.tokens, 1))

    def finish(self) -> Tensor:
        """Return H in the memory of the sums, to which nothing can be added any more."""
        return self._mirror(self._divide())

    def _mirror(self, upper_II: Tensor) -> Tensor:
        """Fill in, in place, what lies left of the diagonal."""
        for start in self._starts:
            end = start + self._starts.step
            square = upper_II[start:end, start:end]
            square.copy_(square.triu() + square.triu(1).T)
            upper_II[end:, start:end] = upper_II[start:end, end:].T
        return upper_II


def find_dead_inputs(H_II: Tensor) -> Tensor:
    """Return a mask (in,) of inputs that are zero in every token."""
    return H_II.diagonal() == 0


def add_damping(H_II: Tensor, damping: float, *, dead_share: float = 1.0) -> Tensor:
    """Return H with dead inputs made inert and `damping` times its mean live diagonal added.

    `dead_share`: share of that mean that a dead input gets.
    """
    mean = compute_live_mean(H_II)
    return _damp_in_place(H_II.clone(), damping, mean, dead_share)


def _damp_in_place(H_II: Tensor, damping: float, mean: Tensor, dead_share: float = 1.0) -> Tensor:
    diagonal_I = H_II.diagonal()
    diagonal_I[find_dead_inputs(H_II)] = mean * dead_share
    diagonal_I += damping * mean
    return H_II


def compute_live_mean(H_II: Tensor) -> Tensor:
    """Return the mean diagonal (scalar) over the inputs that are not dead; 1 if all are."""
    dead_I = find_dead_inputs(H_II)
    return torch.where(dead_I.all(), 1.0, H_II.diagonal().sum() / (~dead_I).sum().clamp_min(1))


def factor_inverse(H_II: Tensor) -> Tensor | None:
    """Return U upper triangular with H^-1 = U^T U, or None if H is not positive definite.

    H^-1 = U^T U with U upper means H = L' L'^T reversed: factor the flipped matrix once, invert
    the triangle, and flip back, which is cheaper and more exact than inverting H first.
    """
    return _factor_inverse_of_flipped(H_II.flip(0, 1))


def _factor_inverse_of_flipped(flipped_II: Tensor) -> Tensor | None:
    """Return U as `factor_inverse` does, in the memory of the matrix."""
    L_II = factor_in_place(flipped_II)
    if L_II is None or not is_finite(L_II):
        return None
    return _flip_in_place(invert_in_place(L_II))


def _flip_in_place(X_II: Tensor) -> Tensor:
    """Reverse rows and columns, a few rows from either end at once."""
    size = len(X_II)
    for start in range(0, size // 2, FLIPPED):
        end = min(start + FLIPPED, size // 2)
        upper, lower = X_II[start:end], X_II[size - end : size - start]
        turned = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(turned)
    if size % 2:
        X_II[size // 2] = X_II[size // 2].flip(0)
    return X_II


def factor_damped_inverse(
    H_II: Tensor, damping: float, order_I: Tensor | None = None
) -> tuple[Tensor | None, float]:
    """Return the factor with the least damping that works.

    Args:
        H_II: the Hessian, not changed.
        damping: share of the mean diagonal to begin with.
        order_I: the order of the inputs in U; as in H without.

    Returns:
        (U, damping used); U is None when even `MOST_DAMPING` does not help.
    """
    if order_I is None:
        order_I = torch.arange(len(H_II), device=H_II.device)
    flipped_I, mean = order_I.flip(0), compute_live_mean(H_II)
    used = damping
    while used <= MOST_DAMPING:
        flipped_II = H_II[flipped_I.unsqueeze(1), flipped_I]
        U_II = _factor_inverse_of_flipped(_damp_in_place(flipped_II, used, mean))
        if U_II is not None:
            return U_II, used
        used *= 10
    return None, used
