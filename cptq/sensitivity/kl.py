"""`kl`: the measured truth, KL(dense || one unit rounded to nearest at one candidate).

Every other metric is judged by it. It is no estimate: the held-out rows run through the model with
that one unit changed. It says nothing of how two units' errors add up, and nothing of compensated
rounding.

Cost: half a forward pass of the held-out tokens per unit and candidate (hours where a metric takes
minutes). Limits: a few hundred tokens; differences below a few per cent are noise.
"""

from __future__ import annotations

from torch import Tensor

from cptq.sensitivity.metric import Metric, Needs, UnitView
from cptq.types import Candidate


class Divergence(Metric):
    """Measured divergence of one change at a time."""

    needs = Needs(probe=True, rounding=True)

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def unit(self, view: UnitView) -> float:
        """The divergence when the unit's weights are all 0."""
        return self._changed(view, view.weights)

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """The divergence of one candidate."""
        return self._changed(view, errors)

    def _changed(self, view: UnitView, errors: tuple[Tensor, ...]) -> float:
        assert self.context.probe is not None
        layers = zip(view.unit.layers, view.weights, errors, strict=True)
        changed = {spec.name: W_OI - dW_OI for spec, W_OI, dW_OI in layers}
        return self.context.probe.divergence(view.unit, changed)
