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
in panels of columns, each from its diagonal on. Then three in^3 / 3 factorizations. float32
throughout; products of float16 activations are never summed in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.numerics.cholesky import factor_in_place
from cptq.numerics.pairwise import MatrixSum

#: largest damping that is tried
MOST_DAMPING = 1.0
#: panels that a second moment is summed in: 0.63 of the multiply-adds, 0.68 of the time
PANELS = 4
#: features of the narrowest panel
LEAST_PANEL = 64


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
    H_II = H_II.clone()
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
    """Return U as `factor_inverse` does; the matrix is overwritten."""
    L_II = factor_in_place(flipped_II)
    if L_II is None or not bool(torch.isfinite(L_II).all()):
        return None
    inverse_II = torch.eye(L_II.shape[0], dtype=L_II.dtype, device=L_II.device)
    torch.linalg.solve_triangular(L_II, inverse_II, upper=False, out=inverse_II)
    U_II: Tensor = inverse_II.flip(0, 1)
    return U_II


def factor_damped_inverse(H_II: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Return the factor with the least damping that works.

    Returns:
        (U, damping used); U is None when even `MOST_DAMPING` does not help.
    """
    used = damping
    while used <= MOST_DAMPING:
        flipped_II = add_damping(H_II, used).flip(0, 1)
        U_II = _factor_inverse_of_flipped(flipped_II)
        if U_II is not None:
            return U_II, used
        used *= 10
    return None, used
