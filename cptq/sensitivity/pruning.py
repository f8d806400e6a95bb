"""`pruning` (PMPQ): the divergence when one unit loses its smallest weights.

    s(p) = KL(dense || unit pruned to sparsity p),  p in {0.1, 0.3, 0.5}

on held-out calibration rows, weights only, by magnitude, one threshold per matrix (CPTQuant, arXiv
2412.03599, PMPQ; its code zeroes 30% of every parameter of a block, norms and biases too, and takes
a test metric's difference). The details hold each unit's curve and the area under it from 0 to 0.5.

From a curve over p to a score per candidate: the linear form (`cptq.sensitivity.relative`) with

    alpha = mean over p of s(p) / t^2(p)

where t^2(p) is the relative squared norm of what pruning takes away: pruning is the probe that
HIGGS makes with Gaussian noise. The number of weights does not enter: alpha is measured for the
unit as a whole, and t^2 is relative.

Essential sparsity (Jaiswal et al., arXiv 2306.03805): the sparsity of the WHOLE model, beyond which
the loss rises steeply. Measured once all units are done, with all of them pruned together, one
threshold per matrix, to p = 0, 0.1 ... 0.9, and at the two sparsities `FINE` beside the knee of
that curve (`cptq.numerics.knee`); the knee among all these points is the answer.

Cost: three half forward passes of the held-out tokens per unit, and eleven whole ones. Limits:
magnitude pruning removes small weights of all inputs alike, rounding hurts the inputs with large
activations most; 50% is far from the linear range in some units (compare the points of the curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from cptq.checkpoint.weights import get_weight
from cptq.numerics.knee import knee
from cptq.numerics.masks import magnitude_pruned, relative_error
from cptq.sensitivity.metric import Context, Needs, UnitView
from cptq.sensitivity.relative import Slope
from cptq.types import Progress

SPARSITIES = (0.1, 0.3, 0.5)
#: sparsities of the whole model among which its knee is looked for, and how near it is then found
WHOLE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FINE = 0.05


def area(sparsities: tuple[float, ...], curve: tuple[float, ...]) -> float:
    """Trapezoid area under a curve that starts at (0, 0)."""
    points = [(0.0, 0.0), *zip(sparsities, curve, strict=True)]
    return sum((p1 - p0) * (s0 + s1) / 2 for (p0, s0), (p1, s1) in pairwise(points))


def essential_sparsity(curve: dict[float, float]) -> float | None:
    """The sparsity at the knee of a curve {sparsity: loss} that begins at (0, 0)."""
    places = [0.0, *sorted(curve)]
    at = knee(places, [0.0, *(curve[p] for p in sorted(curve))])
    return None if at is None else places[at]


class Pruning(Slope):
    """Divergence under magnitude pruning, carried to candidates by the linear form."""

    needs = Needs(probe=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._curves: dict[str, list[float]] = {}
        self._areas: dict[str, float] = {}
        self._whole: dict[float, float] = {}

    def slope(self, view: UnitView) -> float:
        """alpha: the divergence per relative squared error."""
        assert self.context.probe is not None
        curve, slopes = [], []
        for sparsity in SPARSITIES:
            pruned = [magnitude_pruned(W_OI, sparsity) for W_OI in view.weights]
            layers = zip(view.unit.layers, pruned, strict=True)
            changed = {spec.name: P_OI for spec, P_OI in layers}
            curve.append(self.context.probe.divergence(view.unit, changed))
            t2 = lost(view.weights, pruned)
            slopes.append(curve[-1] / t2 if t2 else 0.0)
        self._curves[view.unit.name] = curve
        self._areas[view.unit.name] = area(SPARSITIES, tuple(curve))
        return sum(slopes) / len(slopes)

    def finish(self) -> None:
        """The curve of the whole model."""
        steps = len(WHOLE) + 2
        for sparsity in WHOLE:
            self._prune_all(sparsity, steps)
        coarse = essential_sparsity(self._whole)
        if coarse is not None:
            for step in (-FINE, FINE):
                self._prune_all(round(coarse + step, 4), steps)
        self.context.emit(Progress(stage="essential sparsity", done=steps, total=steps))

    def _prune_all(self, sparsity: float, steps: int) -> None:
        model, probe = self.context.model, self.context.probe
        assert probe is not None
        message = f"{sparsity:.0%} of all weights"
        done = len(self._whole)
        self.context.emit(
            Progress(stage="essential sparsity", done=done, total=steps, message=message)
        )
        weights = {s.name: get_weight(model.linear(s.name)) for u in model.units for s in u.layers}
        pruned = {name: magnitude_pruned(W_OI.float(), sparsity) for name, W_OI in weights.items()}
        self._whole[sparsity] = probe.whole(pruned)

    def details(self) -> dict[str, Any]:
        """Curves and areas per unit, and the curve of the whole model with its knee."""
        whole = dict(sorted(self._whole.items()))
        complete = set(WHOLE) <= set(whole)
        return {
            "sparsities": list(SPARSITIES),
            "curve": self._curves,
            "area": self._areas,
            "whole_model_curve": {f"{p:g}": loss for p, loss in whole.items()},
            "essential_sparsity": essential_sparsity(whole) if complete else None,
        }


def lost(weights: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """t^2 of what pruning takes away."""
    return relative_error([W - P for W, P in zip(weights, pruned, strict=True)], weights)
