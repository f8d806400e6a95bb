"""`pruning` (PMPQ): the divergence when the smallest weights of one unit are pruned.

    s(p) = KL(dense || unit pruned to sparsity p),  p in {0.1, 0.3, 0.5}

on held-out calibration rows, weights only, by magnitude, one threshold per matrix (CPTQuant, arXiv
2412.03599, PMPQ). The details hold each unit's curve and the area under it from 0 to 0.5.

Departures: the paper's code zeroes 30% of every parameter of a block, norms and biases too, and
takes a test metric's difference.

From a curve over p to a score per candidate: the linear form (`cptq.sensitivity.slope_metric`) with

    alpha = mean over p of s(p) / t^2(p)

where t^2(p) is the relative squared norm of the pruned weights: pruning takes the place of the
Gaussian noise of HIGGS. The number of weights does not matter: alpha is measured for the unit as a
whole, and t^2 is relative.

Essential sparsity (Jaiswal et al., arXiv 2306.03805): the sparsity of the WHOLE model beyond which
the loss rises steeply. Measured after all units, with all of them pruned together, one threshold
per matrix, to p = 0, 0.1 ... 0.9, and at the two sparsities `KNEE_STEP` beside the knee of that
curve (`cptq.numerics.knee`); the result is the knee among all these points.

Cost: three half forward passes of the held-out tokens per unit, and eleven whole ones. Limits:
magnitude pruning treats all inputs alike, rounding hurts inputs with large activations most; 50% is
far from the linear range in some units (compare the points of the curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from cptq.checkpoint.weights import get_stored_weight
from cptq.numerics.knee import find_knee
from cptq.numerics.masks import compute_relative_error, prune_by_magnitude
from cptq.sensitivity.metric import Context, Needs, UnitView
from cptq.sensitivity.slope_metric import SlopeMetric
from cptq.types import Progress

SPARSITIES = (0.1, 0.3, 0.5)
#: sparsities of the whole model among which its knee is searched, and the resolution of the result
WHOLE_MODEL_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KNEE_STEP = 0.05


def integrate_curve(sparsities: tuple[float, ...], curve: tuple[float, ...]) -> float:
    """Return the trapezoid area under a curve that starts at (0, 0)."""
    points = [(0.0, 0.0), *zip(sparsities, curve, strict=True)]
    return sum((p1 - p0) * (s0 + s1) / 2 for (p0, s0), (p1, s1) in pairwise(points))


def find_essential_sparsity(curve: dict[float, float]) -> float | None:
    """Return the sparsity at the knee of a curve {sparsity: loss} that starts at (0, 0)."""
    places = [0.0, *sorted(curve)]
    at = find_knee(places, [0.0, *(curve[p] for p in sorted(curve))])
    return None if at is None else places[at]


class Pruning(SlopeMetric):
    """Slope of the divergence under magnitude pruning."""

    needs = Needs(divergence=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._whole_curve: dict[float, float] = {}

    def measure_slope(self, view: UnitView) -> float:
        """Return alpha, the divergence per relative squared error."""
        assert self.context.divergence is not None
        curve, slopes = [], []
        for sparsity in SPARSITIES:
            pruned = [prune_by_magnitude(W_OI, sparsity) for W_OI in view.weights]
            layers = zip(view.unit.layers, pruned, strict=True)
            changed = {spec.name: P_OI for spec, P_OI in layers}
            curve.append(self.context.divergence.measure_unit(view.unit, changed))
            t2 = compute_pruning_error(view.weights, pruned)
            slopes.append(curve[-1] / t2 if t2 else 0.0)
        self.facts[view.unit.name] = curve
        return sum(slopes) / len(slopes)

    def measure_model(self) -> None:
        """Measure the curve of the whole model."""
        steps = len(WHOLE_MODEL_SPARSITIES) + 2
        for sparsity in WHOLE_MODEL_SPARSITIES:
            self._prune_all(sparsity, steps)
        coarse = find_essential_sparsity(self._whole_curve)
        if coarse is not None:
            for step in (-KNEE_STEP, KNEE_STEP):
                self._prune_all(round(coarse + step, 4), steps)
        self.context.emit(Progress(stage="essential sparsity", done=steps, total=steps))

    def _prune_all(self, sparsity: float, steps: int) -> None:
        model, divergence = self.context.model, self.context.divergence
        assert divergence is not None
        message = f"{sparsity:.0%} of all weights"
        done = len(self._whole_curve)
        self.context.emit(
            Progress(stage="essential sparsity", done=done, total=steps, message=message)
        )
        layers = [spec.name for unit in model.units for spec in unit.layers]
        # made layer by layer, when its block is run: memory may not hold all of them
        pruned = {name: partial(_prune, model.linear(name), sparsity) for name in layers}
        measure = partial(divergence.measure_layers, pruned)
        self._whole_curve[sparsity] = self.context.keep(f"pruned-{sparsity:g}", measure)

    def collect_details(self) -> dict[str, Any]:
        """Return curves and areas per unit, and the curve of the whole model with its knee."""
        whole = dict(sorted(self._whole_curve.items()))
        return {
            "sparsities": list(SPARSITIES),
            "curve": self.facts,
            "area": {n: integrate_curve(SPARSITIES, tuple(c)) for n, c in self.facts.items()},
            "whole_model_curve": {f"{p:g}": loss for p, loss in whole.items()},
            "essential_sparsity": find_essential_sparsity(whole),
        }


def _prune(module: nn.Module, sparsity: float) -> Tensor:
    return prune_by_magnitude(get_stored_weight(module).float(), sparsity)


def compute_pruning_error(weights: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Return t^2 of the pruned weights."""
    return compute_relative_error([W - P for W, P in zip(weights, pruned, strict=True)], weights)
