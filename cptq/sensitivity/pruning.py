"""`pruning` (PMPQ): the divergence when one unit loses its smallest weights.

    s(p) = KL(dense || unit pruned to sparsity p),  p in {0.3, 0.5}

on held-out calibration rows, weights only, by magnitude, one threshold per matrix (CPTQuant, arXiv
2412.03599, PMPQ; its code zeroes 30% of every parameter of a block, norms and biases too, and takes
a test metric's difference). From a curve over p to a score per candidate: at medium bits the loss
is linear in the relative squared error of a layer (HIGGS, arXiv 2411.17525, theorem 1), so

    score(c) = alpha t^2(c),   alpha = mean over p of s(p) / t^2(p),   t^2 = |dW|_F^2 / |W|_F^2

with t^2(p) of the pruned and t^2(c) of the rounded weights: pruning is the probe that HIGGS makes
with Gaussian noise. The number of weights does not enter: alpha is measured for the unit as a
whole, and t^2 is relative.

Cost: two half forward passes of the held-out tokens per unit. Limits: magnitude pruning removes
small weights of all inputs alike, rounding hurts the inputs with large activations most; 50% is far
from the linear range in some units (compare the two points of the curve).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from cptq.numerics.masks import magnitude_pruned, relative_error
from cptq.sensitivity.metric import Context, Metric, Needs, UnitView
from cptq.types import Candidate

SPARSITIES = (0.3, 0.5)


def area(sparsities: tuple[float, ...], curve: tuple[float, ...]) -> float:
    """Trapezoid area under a curve that starts at (0, 0)."""
    points = [(0.0, 0.0), *zip(sparsities, curve, strict=True)]
    return sum((p1 - p0) * (s0 + s1) / 2 for (p0, s0), (p1, s1) in pairwise(points))


class Pruning(Metric):
    """Divergence under magnitude pruning, carried to candidates by the linear form."""

    needs = Needs(probe=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._alpha = 0.0
        self._curves: dict[str, list[float]] = {}
        self._areas: dict[str, float] = {}

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def unit(self, view: UnitView) -> float:
        """alpha: the divergence per relative squared error."""
        assert self.context.probe is not None
        curve, slopes = [], []
        for sparsity in SPARSITIES:
            pruned = [magnitude_pruned(W_OI, sparsity) for W_OI in view.weights]
            layers = zip(view.unit.layers, pruned, strict=True)
            curve.append(
                self.context.probe.divergence(view.unit, {s.name: W_OI for s, W_OI in layers})
            )
            lost = tuple(W - P for W, P in zip(view.weights, pruned, strict=True))
            t2 = relative_error(lost, view.weights)
            slopes.append(curve[-1] / t2 if t2 else 0.0)
        self._curves[view.unit.name] = curve
        self._areas[view.unit.name] = area(SPARSITIES, tuple(curve))
        self._alpha = sum(slopes) / len(slopes)
        return self._alpha

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """alpha t^2 of one candidate."""
        return self._alpha * relative_error(errors, view.weights)

    def details(self) -> dict[str, Any]:
        """The curve over sparsities and the area under it, per unit."""
        return {"sparsities": list(SPARSITIES), "curve": self._curves, "area": self._areas}
