"""`kl`: ground truth by measurement, KL(dense || one unit stored as one candidate).

The reference for every other metric: the held-out rows run through the model with that one unit
changed, compressed by the compressor of the run (`Context.compress`) on the dense model's
activations; rounded to nearest where none is given. The sum of several units' errors is not
measured.

Cost: half a forward pass of the held-out tokens per unit and candidate, and compressing it (hours
where other metrics take minutes). Limits: a few hundred tokens; differences below a few per cent
are noise.
"""

from __future__ import annotations

from torch import Tensor

from cptq.sensitivity.metric import Metric, Needs, UnitView
from cptq.types import Candidate


class Kl(Metric):
    """Measured divergence of one changed unit at a time."""

    needs = Needs(divergence=True)

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def measure_unit(self, view: UnitView) -> float:
        """Return the divergence when the unit's weights are all 0."""
        return self._measure_change(view, view.weights)

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the divergence of one candidate."""
        compress, divergence = self.context.compress, self.context.divergence
        if compress is None:
            rounding = self.context.rounding
            errors = rounding.compute_errors(view.unit, view.weights, candidate)
            return self._measure_change(view, errors)
        assert divergence is not None
        return divergence.measure_unit(view.unit, compress(view.unit, candidate))

    def _measure_change(self, view: UnitView, errors: tuple[Tensor, ...]) -> float:
        assert self.context.divergence is not None
        layers = zip(view.unit.layers, view.weights, errors, strict=True)
        changed = {spec.name: W_OI - dW_OI for spec, W_OI, dW_OI in layers}
        return self.context.divergence.measure_unit(view.unit, changed)
