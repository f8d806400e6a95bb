"""`taylor` (TDMPQ): a Taylor expansion of the loss along the rounding error of each candidate.

    dL ~ |g . dW| + 1/2 sum_ki F_ki dW_ki^2,      dW = W - Q_b(W)

Second order: F is the diagonal of the true Fisher, F_ki = sum_t g_tk^2 x_ti^2 over sampled tokens
(Hessian of KL(dense || compressed), see cptq.calibration.objective). First order: g is the gradient
of the real next-token loss (causal language models; elsewhere calibration text has no labels and
the KL's own first order is 0). The paper (CPTQuant, arXiv 2412.03599, TDMPQ) describes a Taylor
expansion; its released code adds noise to a parameter and takes the loss, with no gradient and no
baseline.

Departure: at converged weights the gradient of a few hundred tokens is mostly sampling noise, and
|noise . dW| is linear in the step where the true cost is quadratic, so it would dominate at high
bits. If the true g were 0 the estimate's variance would be dW^T F dW / n = 2 second / n over n
tokens; only the part of the first order beyond three standard errors counts,

    first = sqrt(max(0, (g . dW)^2 - 9 * 2 second / n)).

Cost: one forward and one backward pass (two where there are labels), then one product of size
rows x out x in per layer and one pass over the weights per candidate. Limits: no products between
weights, so correlated inputs (a large common mean) are under-counted; `output-rtn` has those
between inputs.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cptq.calibration.samples import LayerSample, SampleRequest
from cptq.sensitivity.metric import Metric, Needs, UnitView
from cptq.types import Candidate

#: standard errors that a first-order term must exceed to count
STANDARD_ERRORS = 3.0


def compute_diagonal_fisher(g_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Return F_OI = sum_t g_to^2 x_ti^2, the squared weight gradients summed over tokens."""
    return g_TO.square().T @ x_TI.square()


def compute_second_order(F_OI: Tensor, dW_OI: Tensor) -> float:
    """Return 1/2 sum F dW^2."""
    return float((F_OI * dW_OI.square()).sum()) / 2


def subtract_noise(first: float, second: float, rows: int) -> float:
    """Return the part of |first| beyond the noise of sampling `rows` tokens (see above)."""
    variance = 2 * second / max(rows, 1)
    return math.sqrt(max(0.0, first * first - STANDARD_ERRORS**2 * variance))


class Taylor(Metric):
    """Diagonal second order plus the significant part of the first."""

    needs = Needs(samples=SampleRequest(gradients=True, label_gradients=True), rounding=True)

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._fisher: list[Tensor] = []
        self._gradient: list[Tensor | None] = []
        self._terms: dict[str, dict[str, list[float]]] = {}

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def measure_unit(self, view: UnitView) -> float:
        """Return 1/2 sum F W^2, the second-order cost of removing the unit's weights."""
        self._fisher = [_estimate_fisher(sample) for sample in view.samples]
        self._gradient = [_estimate_gradient(sample) for sample in view.samples]
        pairs = zip(self._fisher, view.weights, strict=True)
        return sum(compute_second_order(F_OI, W_OI) for F_OI, W_OI in pairs)

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return first plus second order of one candidate, summed over the unit's layers."""
        first, second = 0.0, 0.0
        for F_OI, G_OI, dW_OI in zip(self._fisher, self._gradient, errors, strict=True):
            second += compute_second_order(F_OI, dW_OI)
            first += float((G_OI * dW_OI).sum()) if G_OI is not None else 0.0
        first = subtract_noise(first, second, len(view.samples[0].x_TI))
        self._terms.setdefault(view.unit.name, {})[candidate.label] = [first, second]
        return first + second

    def collect_details(self) -> dict[str, Any]:
        """Return the [first, second] order terms of every score."""
        return {"first_and_second_order": self._terms}


def _estimate_fisher(sample: LayerSample) -> Tensor:
    assert sample.g_TO is not None
    return compute_diagonal_fisher(sample.g_TO, sample.x_TI) * sample.scale


def _estimate_gradient(sample: LayerSample) -> Tensor | None:
    if sample.label_g_TO is None:
        return None
    return (sample.label_g_TO.T @ sample.x_TI) * sample.scale
