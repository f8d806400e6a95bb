"""`taylor` (TDMPQ): the second order of a Taylor expansion of the loss, per candidate.

    score = 1/2 sum_ki F_ki dW_ki^2,      dW = W - Q_b(W)

F is the diagonal of the true Fisher, F_ki = sum_t g_tk^2 x_ti^2 over sampled tokens: that of the
Hessian of KL(dense || compressed) (cptq.calibration.objective), so that the score is in its unit.
The paper (CPTQuant, arXiv 2412.03599, TDMPQ) describes a Taylor expansion; its released code adds
noise to a parameter and takes the loss, with no gradient and no baseline.

Departure: no first order. That of the KL is exactly 0. The gradient of the next-token loss is not,
but it belongs to another loss, that of the calibration text's own words, and a compressed model is
judged by its distance from the dense one. Added to the second order it ranked units worse on text
of another domain (CHANGELOG.md has the figures).

Cost: two forward passes and a backward one, then one product of size rows x out x in per layer and
one pass over the weights per candidate. Limits: no products between weights, so correlated inputs
(a large common mean) are under-counted; `output-rtn` has those between inputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cptq.calibration.recorder import LayerSample, SampleRequest
from cptq.numerics.reproducible import compute_total
from cptq.sensitivity.metric import Metric, Needs, UnitView
from cptq.types import Candidate


def compute_diagonal_fisher(g_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Return F_OI = sum_t g_to^2 x_ti^2, the squared weight gradients summed over tokens."""
    return g_TO.square().T @ x_TI.square()


def compute_second_order(F_OI: Tensor, dW_OI: Tensor) -> float:
    """Return 1/2 sum F dW^2."""
    return float(compute_total(F_OI * dW_OI.square())) / 2


class Taylor(Metric):
    """Diagonal second order."""

    needs = Needs(samples=SampleRequest(gradients=True), rounding=True)

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._fisher: list[Tensor] = []

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def measure_unit(self, view: UnitView) -> float:
        """Return 1/2 sum F W^2, the second-order cost of removing the unit's weights."""
        self._fisher = [_estimate_fisher(sample) for sample in view.samples]
        pairs = zip(self._fisher, view.weights, strict=True)
        return sum(compute_second_order(F_OI, W_OI) for F_OI, W_OI in pairs)

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the second order of one candidate, summed over the unit's layers."""
        pairs = zip(self._fisher, errors, strict=True)
        return sum(compute_second_order(F_OI, dW_OI) for F_OI, dW_OI in pairs)


def _estimate_fisher(sample: LayerSample) -> Tensor:
    assert sample.g_TO is not None
    return compute_diagonal_fisher(sample.g_TO, sample.x_TI) * sample.scale
