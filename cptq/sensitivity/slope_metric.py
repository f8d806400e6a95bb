"""Metrics that score slope times relative rounding error, the linear form of HIGGS: base classes.

At medium bits the loss that rounding one layer causes is linear in its relative squared error
(arXiv 2411.17525, theorem 1), so a slope s per unit gives

    score(c) = s t^2(c),      t^2(c) = |W - Q_c(W)|_F^2 / |W|_F^2 of nearest rounding.

- `SlopeMetric`: s is loss per relative squared error, measured for the unit as a whole.
- `DimensionlessMetric`: s is a number without a unit of loss (a similarity, a shape of the
  weights). A loss adds up over weights, while such an s is a mean over them, so the score includes
  the unit's share of all weights: s (n_u / n) t^2. Units of equal s then get equal bits: where s
  does not distinguish units, the plan is the uniform one.

t^2 is measured on evenly spaced rows of each matrix (`sample_rows`): rounding a whole model at
every candidate would cost as much as measuring s. On smollm2-135m the estimate is 0.7% off (median
over units at 2, 4 and 8 bits), 3.5% at most.

Cost: rounding those rows, shared by all metrics of this kind. Limits: t^2 does not depend on which
of a layer's weights have the errors; linearity ends below about 3 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cptq.checkpoint.weights import get_scale_dtype
from cptq.sensitivity.metric import Context, Metric, UnitView
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.types import Candidate, LayerSpec

#: rows of a matrix, and weights in them, that t^2 is measured on
SAMPLED_ROWS, SAMPLED_WEIGHTS = 64, 1 << 15


def sample_rows(W_OI: Tensor) -> Tensor:
    """Return evenly spaced rows: `SAMPLED_ROWS`, or more to hold `SAMPLED_WEIGHTS` weights."""
    rows = max(SAMPLED_ROWS, -(-SAMPLED_WEIGHTS // W_OI.shape[1]))
    if len(W_OI) <= rows:
        return W_OI
    return W_OI[torch.linspace(0, len(W_OI) - 1, rows, device=W_OI.device).round().long()]


def estimate_rounding_error(
    weights: Sequence[Tensor], layers: Sequence[LayerSpec], candidate: Candidate
) -> float:
    """Estimate t^2 = sum |W - Q(W)|_F^2 / sum |W|_F^2 over matrices from some rows of each.

    Each matrix W_OI is weighted by all of its rows; 0 where the weights are all 0.
    """
    lost = energy = 0.0
    for spec, some_RI, count_R in _stack_rows(weights, layers, candidate):
        lost_R = compute_rounding_error(some_RI, spec, candidate).square().sum(1)
        lost += float(count_R @ lost_R.double())
        energy += float(count_R @ some_RI.square().sum(1).double())
    return lost / energy if energy else 0.0


def _stack_rows(
    weights: Sequence[Tensor], layers: Sequence[LayerSpec], candidate: Candidate
) -> Iterator[tuple[LayerSpec, Tensor, Tensor]]:
    """Yield rows to round in one call: (a layer like all of them, rows, how many each represents).

    For small tensors the number of calls is the cost. Which weights a sparse candidate drops
    depends on the matrix, so then each matrix has a call of its own.
    """
    alike: dict[Hashable, list[tuple[LayerSpec, Tensor]]] = {}
    for W_OI, spec in zip(weights, layers, strict=True):
        key = spec.name if candidate.sparsity else (spec.shape[1], get_scale_dtype(spec))
        alike.setdefault(key, []).append((spec, W_OI))
    for stack in alike.values():
        some = [sample_rows(W_OI) for _, W_OI in stack]
        counts = [len(W_OI) / len(rows) for rows, (_, W_OI) in zip(some, stack, strict=True)]
        each = [
            rows.new_full((len(rows),), count) for rows, count in zip(some, counts, strict=True)
        ]
        yield stack[0][0], torch.cat(some), torch.cat(each).double()


class SlopeMetric(Metric):
    """score = s t^2, with s in units of loss."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._slope = 0.0

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    @abstractmethod
    def measure_slope(self, view: UnitView) -> float:
        """Return s of a unit."""

    def measure_unit(self, view: UnitView) -> float:
        """Return s of a unit and keep it for its candidates."""
        self._slope = self.measure_slope(view)
        return self._slope

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return s t^2 of one candidate."""
        return self._slope * view.memo.get(
            ("t2", candidate),
            lambda: estimate_rounding_error(view.weights, view.unit.layers, candidate),
        )


class DimensionlessMetric(SlopeMetric):
    """score = s (n_u / n) t^2, with s a pure number."""

    #: what s is, for the unit of the score
    slope_name: str

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._weights = sum(unit.numel for unit in context.model.units)

    @property
    def score_unit(self) -> str:
        return f"{self.slope_name}, times relative squared error, times share of the weights"

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return s (n_u / n) t^2 of one candidate."""
        share = view.unit.numel / self._weights
        return share * super().score_candidate(view, candidate, errors)

    def score_outer(
        self,
        view: UnitView,
        candidate: Candidate,
        divergence: float,
        per_unit: Mapping[str, float],
    ) -> float:
        """Return the same with the mean s of the units in blocks: outside, s is not defined."""
        self._slope = sum(per_unit.values()) / max(len(per_unit), 1)
        return self.score_candidate(view, candidate, ())


class WeightsOnlyMetric(DimensionlessMetric):
    """s is computed from each matrix; a unit has the mean, matrices weighted by their size."""

    def measure_slope(self, view: UnitView) -> float:
        """Return the mean of `score_matrix` over the unit's layers."""
        total = sum(self.score_matrix(W_OI) * W_OI.numel() for W_OI in view.weights)
        return total / view.unit.numel

    @abstractmethod
    def score_matrix(self, W_OI: Tensor) -> float:
        """Return s of one matrix (out, in)."""
