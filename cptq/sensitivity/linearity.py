"""`linearity` (HIGGS): the divergence per relative squared error, measured with Gaussian noise.

    alpha = KL(dense || unit with W + t |W|_F / sqrt(n) eps) / t^2,      eps ~ N(0, 1) per weight
    score(c) = alpha t^2(c),                                             t^2(c) of nearest rounding

By the linearity theorem (Malinovskii et al., arXiv 2411.17525, theorem 1) the loss is linear in
sum_l alpha_l t_l^2 at medium bits, whatever the source of the error, so one trial with an error of
known size gives the slope. t^2 = `NOISE` lies between those of nearest rounding at 4 and at 3 bits
with groups of 64 (about 0.01 and 0.04 for normal weights). The number of weights does not matter:
alpha is measured for the unit as a whole.

Departures: the paper takes the increase of perplexity and fits alpha over several noise levels; the
KL divergence has no first order, is exact in the dense model and needs one level.

Cost: half a forward pass of the held-out tokens per unit. Limits: Gaussian noise is spread
evenly, rounding errors are not; a few hundred tokens; one draw of the noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cptq.numerics.masks import compute_squared_norm
from cptq.sensitivity.metric import Needs, UnitView
from cptq.sensitivity.slope_metric import SlopeMetric

#: t^2 of the noise
NOISE = 0.02


def add_noise(W_OI: Tensor, t2: float, generator: torch.Generator) -> Tensor:
    """Return W plus Gaussian noise whose expected squared norm is t2 |W|_F^2."""
    deviation = math.sqrt(t2 * compute_squared_norm(W_OI) / W_OI.numel())
    eps_OI = torch.randn(W_OI.shape, generator=generator).to(W_OI.device)
    return torch.add(W_OI, eps_OI, alpha=deviation)


class Linearity(SlopeMetric):
    """Slope of the divergence under Gaussian noise."""

    needs = Needs(divergence=True)

    def measure_slope(self, view: UnitView) -> float:
        """Return alpha, the divergence per relative squared error."""
        assert self.context.divergence is not None
        index = self.context.model.units.index(view.unit)
        generator = torch.Generator().manual_seed(self.context.seed + index)
        changed = {
            spec.name: add_noise(W_OI, NOISE, generator)
            for spec, W_OI in zip(view.unit.layers, view.weights, strict=True)
        }
        return self.context.divergence.measure_unit(view.unit, changed) / NOISE

    def collect_details(self) -> dict[str, Any]:
        """Return the size of the noise."""
        return {"relative_squared_noise": NOISE}
