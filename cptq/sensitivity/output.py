"""`output`: the error of a linear's output, weighted by how much the loss depends on each output.

    score = 1/2 mean_t sum_k g_tk^2 (dW_k . x_t)^2        per output row of the model

with g_t the gradient of the pseudo-loss by the linear's output at token t
(cptq.calibration.objective), so that the score is, to second order, KL(dense || compressed) in nats
per token. Dropped: products of different outputs' errors and of different tokens' (independent
rounding makes both 0 in expectation, except for the contribution of a common mean of the inputs).

Two forms, which differ in the rounding that they assume:

- `output-rtn` (NVIDIA modelopt's auto-quantize score): dW is that of nearest rounding.
- `output`: error-compensated rounding (GPTQ). Column j is rounded with error r_j and the columns
  after it compensate for part of it, so dW = R M with M = diag(U)^-1 U unit upper triangular and
  H^-1 = U^T U. Hence dW_k . x = sum_j r_kj z_j with z = M x. Rounding errors of different columns
  being independent,

      score = 1/2 mean_t sum_k g_tk^2 sum_j r_kj^2 z_tj^2

  which unweighted is r^2 tr(D), the LDL form of GPTQ's error (QuIP, arXiv 2307.13304, theorem 1).
  r is taken from nearest rounding on the same grid. It costs less than the first form: one product
  per layer instead of one per candidate. Columns are taken in descending order of H_jj, as in the
  sweep, and z^2 is corrected for being fitted and measured on the same tokens
  (`compute_optimism`).

Cost: two forward passes and a backward one, then per layer one factorisation in^3 (`output`) or per
candidate one product rows x out x in (`output-rtn`). Limits: inputs of the dense model; where an
input is too wide for its full second moment, columns compensate for one another only within chunks
of a quarter as many columns as there are rows, which overstates the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptq.calibration.recorder import LayerSample, SampleRequest
from cptq.numerics.hessian import compute_live_mean, factor_damped_inverse
from cptq.numerics.reproducible import compute_total
from cptq.sensitivity.metric import Context, Metric, Needs, UnitView
from cptq.sensitivity.taylor import compute_diagonal_fisher, compute_second_order
from cptq.types import Candidate, Notice

#: damping as a share of the mean diagonal, the same as in the `gptq` compressor
DAMPING = 0.01
#: floor of the residual degrees of freedom, as a share of the tokens, in the optimism correction
LEAST_SHARE = 0.1


def compute_feedback(H_II: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return how a sweep over H compensates; None where H cannot be factored.

    Returns:
        M (in, in) in natural column order, with dW = R M; and df (in,), the effective number of
        inputs that compensate for an error in each column.
    """
    order_I = H_II.diagonal().argsort(descending=True, stable=True)
    U_II, damping = factor_damped_inverse(H_II, DAMPING, order_I)
    if U_II is None:
        return None
    M_II = torch.empty_like(H_II)
    M_II[order_I[:, None], order_I] = U_II / U_II.diagonal().unsqueeze(1)
    df_I = torch.empty_like(H_II[0])
    df_I[order_I] = count_effective_inputs(U_II, compute_ridge(H_II, damping))
    return M_II, df_I


def compute_ridge(H_II: Tensor, damping: float) -> float:
    """Return what damping adds to the diagonal (see `numerics.hessian`)."""
    return damping * float(compute_live_mean(H_II))


def count_effective_inputs(U_II: Tensor, compute_ridge: float) -> Tensor:
    """Return the degrees of freedom (in,) of the ridge regression of each column on those after it.

    df_j = tr(H_F (H_F + e I)^-1) = |F| - e tr((H_F + e I)^-1) over the columns F after j, and the
    inverse of a trailing block is U_F^T U_F: a running sum of the rows of U.
    """
    rows_I = U_II.square().sum(1)
    after_I = rows_I.flip(0).cumsum(0).flip(0) - rows_I
    count_I = torch.arange(len(rows_I) - 1, -1, -1, device=rows_I.device, dtype=rows_I.dtype)
    return (count_I - compute_ridge * after_I).clamp_min(0.0)


def compute_optimism(df_I: Tensor, sampled: int, calibration: int) -> Tensor:
    """Return the factor (in,) by which the error on new tokens exceeds that on the sampled ones.

    The optimism of a regression: on its `sampled` tokens the squared residual is too small by
    1 - df / sampled; one fitted on the compressor's `calibration` tokens is larger elsewhere by
    1 / (1 - df / calibration).
    """
    seen_I = (1 - df_I / sampled).clamp_min(LEAST_SHARE)
    fitted_I = (1 - df_I / max(calibration, sampled)).clamp_min(LEAST_SHARE)
    return 1.0 / (seen_I * fitted_I)


def compute_weighted_output_error(g_TO: Tensor, dy_TO: Tensor) -> float:
    """Return 1/2 sum_t sum_k g_tk^2 dy_tk^2."""
    return float(compute_total((g_TO * dy_TO).square())) / 2


class OutputNearest(Metric):
    """Diagonal Fisher x output error of nearest rounding."""

    needs = Needs(samples=SampleRequest(gradients=True), rounding=True)

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    def measure_unit(self, view: UnitView) -> float:
        """Return the second-order cost of zeroing the unit: its weighted output itself."""
        return view.memo.get("zeroed", lambda: self._compute_error(view, view.weights))

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the weighted output error of one candidate, summed over the unit's layers."""
        return self._compute_error(view, errors)

    def _compute_error(self, view: UnitView, changes: tuple[Tensor, ...]) -> float:
        total = 0.0
        for sample, dW_OI in zip(view.samples, changes, strict=True):
            assert sample.g_TO is not None
            total += sample.scale * compute_weighted_output_error(
                sample.g_TO, sample.x_TI @ dW_OI.T
            )
        return total


class Output(OutputNearest):
    """Diagonal Fisher x expected output error of error-compensated rounding."""

    needs = Needs(samples=SampleRequest(gradients=True, moments=True), rounding=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._fisher: list[Tensor] = []

    def measure_unit(self, view: UnitView) -> float:
        """Return the number of `output-rtn`; prepare the weights of the squared rounding errors."""
        seen: dict[int, Tensor] = {}
        self._fisher = []
        for sample in view.samples:
            if id(sample.x_TI) not in seen:
                seen[id(sample.x_TI)] = self._compensate(view, sample)
            assert sample.g_TO is not None
            z_TI = seen[id(sample.x_TI)]
            self._fisher.append(compute_diagonal_fisher(sample.g_TO, z_TI) * sample.scale)
        return super().measure_unit(view)

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the expected weighted output error of one candidate, summed over its layers."""
        pairs = zip(self._fisher, errors, strict=True)
        return sum(compute_second_order(F_OI, dW_OI) for F_OI, dW_OI in pairs)

    def _compensate(self, view: UnitView, sample: LayerSample) -> Tensor:
        """Return z (rows, in), the inputs that multiply each column's error after compensation."""
        x_TI = sample.x_TI
        if sample.moment is not None:
            H_II = sample.moment.mean_II.to(x_TI.device)
            return self._apply_feedback(x_TI, H_II, sample.moment.tokens, view)
        self.facts[view.unit.name] = "in chunks"
        width = max(1, len(x_TI) // 4)
        return torch.cat(
            [
                self._apply_feedback(x_TC, x_TC.T @ x_TC / len(x_TC), len(x_TC), view)
                for x_TC in x_TI.split(width, dim=1)
            ],
            dim=1,
        )

    def _apply_feedback(self, x_TI: Tensor, H_II: Tensor, tokens: int, view: UnitView) -> Tensor:
        sweep = compute_feedback(H_II)
        if sweep is not None:
            M_II, df_I = sweep
            factor_I = compute_optimism(df_I, tokens, self.context.calibration_tokens)
            return (x_TI @ M_II.T) * factor_I.sqrt()
        message = "its second moment cannot be factored: scored as rounded without compensation"
        self.context.emit(Notice(kind="fallback", subject=view.unit.name, message=message))
        return x_TI

    def collect_details(self) -> dict[str, Any]:
        """Return the units whose inputs were too wide for a full second moment."""
        return {"compensated_in_chunks": list(self.facts)}
