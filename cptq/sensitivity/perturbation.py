"""`perturbation` (TDMPQ): the divergence when what a unit reads is disturbed.

    s = E KL(dense || the unit reads x + sigma |x| eps) / sigma^2,      eps ~ N(0, 1) per input
    score(c) = s t^2(c)

The paper (CPTQuant, arXiv 2412.03599, TDMPQ) names a layer sensitive if a disturbance of its input
changes the loss, E[L(x + sigma |x| eps) - L(x)]. L is the divergence from the dense model on
held-out rows, so L(x) = 0 and no label's noise is in it; the paper's code adds N(0, 1) to a
parameter and subtracts nothing.

From s to candidates: noise of relative size sigma on each input and noise of relative size t on
each weight give an output the same variance, sum_i W_ki^2 x_i^2 times sigma^2 or t^2. So s per
sigma^2 stands where the slope of the linear form stands (`cptq.sensitivity.relative`).

Cost: half a forward pass of the held-out tokens per unit. Limits: a disturbed input hits all of a
unit's outputs together, rounding each on its own; a few hundred tokens, one draw of the noise.
"""

from __future__ import annotations

from typing import Any

from cptq.sensitivity.metric import Needs, UnitView
from cptq.sensitivity.relative import Slope

#: sigma
NOISE = 0.1


class Perturbation(Slope):
    """Slope of the divergence under disturbed inputs."""

    needs = Needs(probe=True)

    def slope(self, view: UnitView) -> float:
        """s: the divergence per squared relative disturbance."""
        assert self.context.probe is not None
        seed = self.context.seed + self.context.model.units.index(view.unit)
        return self.context.probe.disturbed(view.unit, NOISE, seed) / NOISE**2

    def details(self) -> dict[str, Any]:
        """The size of the disturbance."""
        return {"sigma": NOISE}
