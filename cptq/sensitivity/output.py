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
  per layer instead of one per candidate. Columns are taken by falling H_jj, as the sweep does, and
  z^2 is corrected for having been fitted on the tokens that it is judged on (`optimism`).

Cost: a forward and a backward pass, then per layer one factorisation in^3 (`output`) or per
candidate one product rows x out x in (`output-rtn`). Limits: inputs of the dense model; where an
input is too wide for its full second moment, columns make up for one another only within chunks of
a quarter as many columns as there are rows, which overstates the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptq.calibration.samples import LayerSample, Wants
from cptq.numerics.hessian import damped_factor, live_mean
from cptq.sensitivity.metric import Context, Metric, Needs, UnitView
from cptq.sensitivity.taylor import diagonal_fisher, second_order
from cptq.types import Candidate, Notice

#: share of the mean diagonal, as the `gptq` compressor adds
DAMPING = 0.01
#: residual degrees of freedom, as a share of the tokens, below which optimism is not followed
LEAST_SHARE = 0.1


def feedback(H_II: Tensor) -> tuple[Tensor, Tensor] | None:
    """How a sweep over H compensates; None where H cannot be factored.

    Returns:
        M (in, in) in natural column order, with dW = R M; and df (in,), the effective number of
        inputs that make up for an error in each column.
    """
    order_I = H_II.diagonal().argsort(descending=True, stable=True)
    sorted_II = H_II[order_I][:, order_I]
    U_II, damping = damped_factor(sorted_II, DAMPING)
    if U_II is None:
        return None
    M_II = torch.empty_like(H_II)
    M_II[order_I[:, None], order_I] = U_II / U_II.diagonal().unsqueeze(1)
    df_I = torch.empty_like(H_II[0])
    df_I[order_I] = effective_inputs(U_II, ridge(sorted_II, damping))
    return M_II, df_I


def ridge(H_II: Tensor, damping: float) -> float:
    """What damping adds to the diagonal (see `numerics.hessian`)."""
    return damping * float(live_mean(H_II))


def effective_inputs(U_II: Tensor, ridge: float) -> Tensor:
    """Degrees of freedom (in,) of the ridge regression of each column on those after it.

    df_j = tr(H_F (H_F + e I)^-1) = |F| - e tr((H_F + e I)^-1) over the columns F after j, and the
    inverse of a trailing block is U_F^T U_F: a running sum of the rows of U.
    """
    rows_I = U_II.square().sum(1)
    after_I = rows_I.flip(0).cumsum(0).flip(0) - rows_I
    count_I = torch.arange(len(rows_I) - 1, -1, -1, device=rows_I.device, dtype=rows_I.dtype)
    return (count_I - ridge * after_I).clamp_min(0.0)


def optimism(df_I: Tensor, sampled: int, calibration: int) -> Tensor:
    """Factor (in,) by which the error on new tokens exceeds that on the `sampled` ones.

    In sample a regression's squared residual is too small by 1 - df / sampled; one that is fitted
    on the compressor's `calibration` tokens is too large by 1 / (1 - df / calibration) elsewhere.
    """
    seen_I = (1 - df_I / sampled).clamp_min(LEAST_SHARE)
    fitted_I = (1 - df_I / max(calibration, sampled)).clamp_min(LEAST_SHARE)
    return 1.0 / (seen_I * fitted_I)


def weighted_output_error(g_TO: Tensor, dy_TO: Tensor) -> float:
    """1/2 sum_t sum_k g_tk^2 dy_tk^2."""
    return float((g_TO * dy_TO).square().sum()) / 2


class OutputNearest(Metric):
    """Diagonal Fisher x output error of nearest rounding."""

    needs = Needs(samples=Wants(gradients=True), rounding=True)

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def unit(self, view: UnitView) -> float:
        """The second-order cost of silencing the unit: its weighted output itself."""
        return view.memo.get("silenced", lambda: self._error(view, view.weights))

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

    needs = Needs(samples=Wants(gradients=True, moments=True), rounding=True)

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
            H_II = sample.moment.mean_II.to(x_TI.device)
            return self._through(x_TI, H_II, sample.moment.tokens, view)
        self._chunked.append(view.unit.name)
        width = max(1, len(x_TI) // 4)
        return torch.cat(
            [
                self._through(x_TC, x_TC.T @ x_TC / len(x_TC), len(x_TC), view)
                for x_TC in x_TI.split(width, dim=1)
            ],
            dim=1,
        )

    def _through(self, x_TI: Tensor, H_II: Tensor, tokens: int, view: UnitView) -> Tensor:
        sweep = feedback(H_II)
        if sweep is not None:
            M_II, df_I = sweep
            factor_I = optimism(df_I, tokens, self.context.calibration_tokens)
            return (x_TI @ M_II.T) * factor_I.sqrt()
        message = "its second moment cannot be factored: scored as rounded without compensation"
        self.context.emit(Notice(kind="fallback", subject=view.unit.name, message=message))
        return x_TI

    def details(self) -> dict[str, Any]:
        """Units whose inputs were too wide for a full second moment."""
        return {"compensated_in_chunks": list(self._chunked)}
