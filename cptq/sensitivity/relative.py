"""From one number per unit to a score per candidate: the linear form of HIGGS.

At medium bits the loss that rounding one layer causes is linear in its relative squared error
(arXiv 2411.17525, theorem 1), so a number s that says how much a unit minds gives

    score(c) = s t^2(c),      t^2(c) = |W - Q_c(W)|_F^2 / |W|_F^2 of nearest rounding.

- `Slope`: s is loss per relative squared error, probed for the unit as a whole.
- `Relative`: s is a number without a unit of loss (a similarity, a shape of the weights). A loss
  adds up over weights while such an s is a mean that does not know how many there are, so the score
  takes the unit's share of them in: s (n_u / n) t^2. Units of equal s then get equal bits: where s
  has nothing to say, the plan is the uniform one.

Cost: two norms per layer and candidate, shared by all metrics of this kind. Limits: t^2 does not
know which of a layer's weights are hurt; linearity ends below about 3 bits.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from cptq.numerics.masks import relative_error
from cptq.sensitivity.metric import Context, Metric, UnitView
from cptq.types import Candidate


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
            ("t2", candidate), lambda: relative_error(errors, view.weights)
        )


class Relative(Slope):
    """score = s (n_u / n) t^2, with s a pure number."""

    #: what s is called
    of: str

    @property
    def score_unit(self) -> str:
        return f"{self.of}, times relative squared error, times share of the weights"

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """s (n_u / n) t^2 of one candidate."""
        share = view.unit.numel / sum(unit.numel for unit in self.context.model.units)
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
