"""`output`: the error of a linear's output, weighted by how much each output matters.

    score = 1/2 mean_t sum_k g_tk^2 (dW_k . x_t)^2        per row of the answer

with g_t the gradient of the pseudo-loss by the linear's output at token t
(cptq.calibration.objective), so that the score is, to second order, KL(dense || compressed) in nats
per token. Dropped: products of different outputs' errors and of different tokens' (independent
rounding makes both 0 in expectation, except for what a common mean of the inputs adds).

Two forms, which differ in the rounding that they expect:

- `output-rtn` (NVIDIA modelopt's auto-quantize score): dW is that of nearest rounding, as it is.
- `output`: error-compensated rounding (GPTQ). Column j is rounded with error r_j and the columns
  after it make up for what they can, so dW = R M with M = diag(U)^-1 U unit upper triangular and
  H^-1 = U^T U. Hence dW_k . x = sum_j r_kj z_j with z = M x. Rounding errors of different columns
  being independent,

      score = 1/2 mean_t sum_k g_tk^2 sum_j r_kj^2 z_tj^2

  which unweighted is r^2 tr(D), the LDL form of GPTQ's error (QuIP, arXiv 2307.13304, theorem 1).
  r is taken from nearest rounding on the same grid. It costs less than the first form: one product
  per layer instead of one per candidate. Columns are taken by falling H_jj, as the sweep does.

Cost: a forward and a backward pass, then per layer one factorisation in^3 (`output`) or per
candidate one product rows x out x in (`output-rtn`). Limits: H comes from the tokens of the pass,
so that with few tokens per input the error looks smaller than it will be; where an input is too
wide for its full second moment, columns make up for one another only within chunks of a quarter as
many columns as there are rows, which overstates the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptq.calibration.samples import LayerSample, Wants
from cptq.numerics.hessian import damped_factor
from cptq.sensitivity.metric import Context, Metric, Needs, UnitView
from cptq.sensitivity.taylor import diagonal_fisher, second_order
from cptq.types import Candidate, Notice

DAMPING = 0.01


def feedback(H_II: Tensor) -> Tensor | None:
    """M (in, in) in natural column order, with dW = R M; None where H cannot be factored."""
    order = H_II.diagonal().argsort(descending=True, stable=True)
    U_II, _ = damped_factor(H_II[order][:, order], DAMPING)
    if U_II is None:
        return None
    M_II = torch.empty_like(H_II)
    M_II[order[:, None], order] = U_II / U_II.diagonal().unsqueeze(1)
    return M_II


def weighted_output_error(g_TO: Tensor, dy_TO: Tensor) -> float:
    """1/2 sum_t sum_k g_tk^2 dy_tk^2."""
    return float((g_TO * dy_TO).square().sum()) / 2


class OutputNearest(Metric):
    """Diagonal Fisher x output error of nearest rounding."""

    needs = Needs(samples=Wants(gradients=True))

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def unit(self, view: UnitView) -> float:
        """The second-order cost of silencing the unit: its weighted output itself."""
        return self._error(view, view.weights)

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """The weighted output error of one candidate, summed over the unit's layers."""
        return self._error(view, errors)

    def _error(self, view: UnitView, changes: tuple[Tensor, ...]) -> float:
        total = 0.0
        for sample, dW_OI in zip(view.samples, changes, strict=True):
            assert sample.g_TO is not None
            total += sample.scale * weighted_output_error(sample.g_TO, sample.x_TI @ dW_OI.T)
        return total


class Output(OutputNearest):
    """Diagonal Fisher x expected output error of error-compensated rounding."""

    needs = Needs(samples=Wants(gradients=True, moments=True))

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._fisher: list[Tensor] = []
        self._chunked: list[str] = []

    def unit(self, view: UnitView) -> float:
        """As `output-rtn`; prepares the weights of the squared rounding errors."""
        seen: dict[int, Tensor] = {}
        self._fisher = []
        for sample in view.samples:
            if id(sample.x_TI) not in seen:
                seen[id(sample.x_TI)] = self._compensated(view, sample)
            assert sample.g_TO is not None
            z_TI = seen[id(sample.x_TI)]
            self._fisher.append(diagonal_fisher(sample.g_TO, z_TI) * sample.scale)
        return super().unit(view)

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """The expected weighted output error of one candidate, summed over the unit's layers."""
        pairs = zip(self._fisher, errors, strict=True)
        return sum(second_order(F_OI, dW_OI) for F_OI, dW_OI in pairs)

    def _compensated(self, view: UnitView, sample: LayerSample) -> Tensor:
        """z (rows, in): what an error in each column still does after feedback."""
        x_TI = sample.x_TI
        if sample.moment is not None:
            return self._through(x_TI, sample.moment.mean_II.to(x_TI.device), view)
        self._chunked.append(view.unit.name)
        width = max(1, len(x_TI) // 4)
        return torch.cat(
            [self._through(x, x.T @ x / len(x), view) for x in x_TI.split(width, dim=1)], dim=1
        )

    def _through(self, x_TI: Tensor, H_II: Tensor, view: UnitView) -> Tensor:
        M_II = feedback(H_II)
        if M_II is not None:
            return x_TI @ M_II.T
        message = "its second moment cannot be factored: scored as rounded without compensation"
        self.context.emit(Notice(kind="fallback", subject=view.unit.name, message=message))
        return x_TI

    def details(self) -> dict[str, Any]:
        """Units whose inputs were too wide for a full second moment."""
        return {"compensated_in_chunks": list(self._chunked)}
