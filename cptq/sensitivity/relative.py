"""From one number per unit to a score per candidate: the linear form of HIGGS.

At medium bits the loss that rounding one layer causes is linear in its relative squared error
(arXiv 2411.17525, theorem 1), so a number s that says how much a unit minds gives

    score(c) = s t^2(c),      t^2(c) = |W - Q_c(W)|_F^2 / |W|_F^2 of nearest rounding.

- `Slope`: s is loss per relative squared error, probed for the unit as a whole.
- `Relative`: s is a number without a unit of loss (a similarity, a shape of the weights). A loss
  adds up over weights while such an s is a mean that does not know how many there are, so the score
  takes the unit's share of them in: s (n_u / n) t^2. Units of equal s then get equal bits: where s
  has nothing to say, the plan is the uniform one.

t^2 is measured on some rows of each matrix, evenly spread (`spread`): rounding a whole model at
every candidate would cost as much as what gives s. On smollm2-135m
the estimate is 0.7% off (median over units at 2, 4 and 8 bits), 3.5% at most.

Cost: rounding those rows, shared by all metrics of this kind. Limits: t^2 does not know which of a
layer's weights are hurt; linearity ends below about 3 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from cptq.checkpoint.weights import storage_dtype
from cptq.sensitivity.metric import Context, Metric, UnitView
from cptq.sensitivity.rounding import rounding_error
from cptq.types import Candidate, LayerSpec

#: rows of a matrix, and weights in them, that are enough for t^2
ROWS, WEIGHTS = 64, 1 << 15


def spread(W_OI: Tensor) -> Tensor:
    """`ROWS` rows, or as many as hold `WEIGHTS` weights, evenly spread; or all there are."""
    rows = max(ROWS, -(-WEIGHTS // W_OI.shape[1]))
    if len(W_OI) <= rows:
        return W_OI
    return W_OI[torch.linspace(0, len(W_OI) - 1, rows, device=W_OI.device).round().long()]


def relative_rounding(
    weights: Sequence[Tensor], layers: Sequence[LayerSpec], candidate: Candidate
) -> float:
    """t^2 = sum |W - Q(W)|_F^2 / sum |W|_F^2 over matrices W_OI, from some rows of each.

    Each matrix counts with all of its rows; 0 where the weights are all 0.
    """
    lost = energy = 0.0
    for spec, some_RI, count_R in _stacks(weights, layers, candidate):
        lost_R = rounding_error(some_RI, spec, candidate).square().sum(1)
        lost += float(count_R @ lost_R.double())
        energy += float(count_R @ some_RI.square().sum(1).double())
    return lost / energy if energy else 0.0


def _stacks(
    weights: Sequence[Tensor], layers: Sequence[LayerSpec], candidate: Candidate
) -> Iterator[tuple[LayerSpec, Tensor, Tensor]]:
    """Rows that are rounded in one go (layer like all of them, rows, rows each stands for).

    Small tensors cost what calls cost. Which weights a sparse candidate drops depends on the
    matrix, so that each of them stands alone.
    """
    alike: dict[Hashable, list[tuple[LayerSpec, Tensor]]] = {}
    for W_OI, spec in zip(weights, layers, strict=True):
        key = spec.name if candidate.sparsity else (spec.shape[1], storage_dtype(spec))
        alike.setdefault(key, []).append((spec, W_OI))
    for stack in alike.values():
        some = [spread(W_OI) for _, W_OI in stack]
        counts = [len(W_OI) / len(rows) for rows, (_, W_OI) in zip(some, stack, strict=True)]
        each = [
            rows.new_full((len(rows),), count) for rows, count in zip(some, counts, strict=True)
        ]
        yield stack[0][0], torch.cat(some), torch.cat(each).double()


class Slope(Metric):
    """score = s t^2, with s in units of loss."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._slope = 0.0

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    @abstractmethod
    def slope(self, view: UnitView) -> float:
        """s of a unit."""

    def unit(self, view: UnitView) -> float:
        """s of a unit, kept for its candidates."""
        self._slope = self.slope(view)
        return self._slope

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """s t^2 of one candidate."""
        return self._slope * view.memo.get(
            ("t2", candidate),
            lambda: relative_rounding(view.weights, view.unit.layers, candidate),
        )


class Relative(Slope):
    """score = s (n_u / n) t^2, with s a pure number."""

    #: what s is called
    of: str

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._weights = sum(unit.numel for unit in context.model.units)

    @property
    def score_unit(self) -> str:
        return f"{self.of}, times relative squared error, times share of the weights"

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """s (n_u / n) t^2 of one candidate."""
        share = view.unit.numel / self._weights
        return share * super().candidate(view, candidate, errors)


class OfWeights(Relative):
    """s is a number of each matrix alone; a unit has the mean, matrices weighted by their size."""

    def slope(self, view: UnitView) -> float:
        """The mean of `matrix` over the unit's layers."""
        total = sum(self.matrix(W_OI) * W_OI.numel() for W_OI in view.weights)
        return total / view.unit.numel

    @abstractmethod
    def matrix(self, W_OI: Tensor) -> float:
        """s of one matrix (out, in)."""
