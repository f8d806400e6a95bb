"""The weight that a layer should have where its inputs are no longer those of the dense model.

A linear y = x W^T is compressed after the layers before it, which hand it x^ and not x. Calibrating
on x^ alone asks it for x^ W^T; what the next layer should get is x W^T. The weight that comes
nearest to that is the solution of a ridge regression,

    argmin_V E |x W^T - x^ V^T|^2 = W + W C (H + l I)^-1,   C = E[(x - x^) x^^T],  H = E[x^ x^^T]

The layer is compressed towards W' = W + a W C (H + l I)^-1.

Source: GPTAQ (Li et al., arXiv 2504.02692), which corrects column by column inside the sweep of
GPTQ, with a = 1; written here as a target, so that any compressor can take it and grids are fitted
to what they will hold. Departure: a = 1/2. A full correction fits the errors of the calibration
text: smollm2-135m at 3 bits, KL on held-out text 0.559 without, 0.417 with a = 1, 0.368 with 1/2.

Cost: one factorisation in^3 / 3, 2 out * in^2 multiply-adds per layer, and the sum of C, as much as
that of H. Limits: rows of x and x^ must be of the same tokens, so an expert, to which the router
may send others, has no C.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, linalg

from cptq.numerics.cholesky import factor_in_place
from cptq.numerics.hessian import add_damping
from cptq.numerics.pairwise import MatrixSum

#: a, how much of the correction is made
STRENGTH = 0.5
#: l, as a share of the mean diagonal of H
DAMPING = 0.05


class CrossMoment(MatrixSum):
    """Running mean of (x - x^) x^^T over tokens; `finish` gives C, `tokens` counts the rows."""

    def add(self, x_TI: Tensor, seen_TI: Tensor) -> None:
        """Add the same tokens as the dense model has them, x, and as they reach the layer, x^."""
        seen_TI = seen_TI.float()
        self.open().addmm_((x_TI.float() - seen_TI).T, seen_TI)
        self.tokens += len(seen_TI)

    def finish(self) -> Tensor:
        """Return C in the memory of the sums, to which nothing can be added any more."""
        return self._divide()


def compute_asymmetric_targets(
    weights: Sequence[Tensor],
    H_II: Tensor,
    C_II: Tensor,
    *,
    strength: float = STRENGTH,
    damping: float = DAMPING,
) -> list[Tensor]:
    """Return W' (out, in) of layers that read the same inputs; W where H cannot be factored.

    Args:
        weights: dense weights (out, in).
        H_II: second moment of the inputs that reach the layer.
        C_II: mean of (x - x^) x^^T.
        strength: a.
        damping: l as a share of the mean diagonal of H; dead inputs, whose columns of C are 0, take
            no part.
    """
    L_II = factor_in_place(add_damping(H_II, damping))
    if L_II is None:
        return list(weights)
    return [_move(W_OI, C_II, L_II, strength) for W_OI in weights]


def _move(W_OI: Tensor, C_II: Tensor, L_II: Tensor, strength: float) -> Tensor:
    """Return W + a W C (L L^T)^-1."""
    change_OI = W_OI @ C_II
    change_OI = linalg.solve_triangular(L_II.T, change_OI, upper=True, left=False)
    change_OI = linalg.solve_triangular(L_II, change_OI, upper=False, left=False)
    moved_OI: Tensor = change_OI.mul_(strength).add_(W_OI)
    return moved_OI
