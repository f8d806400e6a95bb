"""`perturbation` (TDMPQ): the divergence with noise on the inputs of a unit.

    s = E KL(dense || the unit reads x + sigma |x| eps) / sigma^2,      eps ~ N(0, 1) per input
    score(c) = s t^2(c)

The paper (CPTQuant, arXiv 2412.03599, TDMPQ) calls a layer sensitive if a perturbation of its input
changes the loss, E[L(x + sigma |x| eps) - L(x)].

Departures: L is the divergence from the dense model on held-out rows, so L(x) = 0 and labels add no
noise; the paper's code adds N(0, 1) to a parameter and subtracts nothing.

From s to candidates: noise of relative size sigma on each input and noise of relative size t on
each weight give an output the same variance, sum_i W_ki^2 x_i^2 times sigma^2 or t^2, so s is the
slope of the linear form (`cptq.sensitivity.slope_metric`).

Cost: half a forward pass of the held-out tokens per unit. Limits: a noisy input affects all
outputs of a unit together, rounding affects each independently; a few hundred tokens, one draw of
the noise.
"""

from __future__ import annotations

from typing import Any

from cptq.sensitivity.metric import Needs, UnitView
from cptq.sensitivity.slope_metric import SlopeMetric

#: sigma
NOISE = 0.1


class Perturbation(SlopeMetric):
    """Slope of the divergence under noise on the inputs."""

    needs = Needs(divergence=True)

    def measure_slope(self, view: UnitView) -> float:
        """Return s, the divergence per squared relative noise."""
        assert self.context.divergence is not None
        seed = self.context.seed + self.context.model.units.index(view.unit)
        return self.context.divergence.measure_input_noise(view.unit, NOISE, seed) / NOISE**2

    def collect_details(self) -> dict[str, Any]:
        """Return the size of the noise."""
        return {"sigma": NOISE}
