"""Metrics made of gradients on the way from W to Q(W): what they share.

Scores of a unit at a candidate come from `Term`s at a few places (`cptq.sensitivity.path`). The
candidate-free number of a unit is its mean score over the candidates that change it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from cptq.sensitivity.metric import Metric, UnitView
from cptq.sensitivity.path import Term
from cptq.sensitivity.rounding import changes
from cptq.types import Candidate


class Along(Metric):
    """Scores from the terms at the places of `needs.path`."""

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    @abstractmethod
    def combine(self, terms: list[Term]) -> float:
        """The score from a unit's terms at each place, in the order of `needs.path`."""

    def unit(self, view: UnitView) -> float:
        """The mean score over the candidates."""
        scores = [self._score(view, c) for c in self.context.candidates if changes(c)]
        return sum(scores) / max(len(scores), 1)

    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """The score of one candidate, all other units being stored as it as well."""
        return self._score(view, candidate)

    def _score(self, view: UnitView, candidate: Candidate) -> float:
        path = self.context.path
        assert path is not None
        return self.combine(
            [path.terms[candidate, place][view.unit.name] for place in self.needs.path]
        )

    def details(self) -> dict[str, Any]:
        """The divergence of the whole model at each candidate, for the scores to add up to."""
        path = self.context.path
        assert path is not None
        whole = {
            candidate.label: divergence
            for (candidate, place), divergence in path.divergence.items()
            if place == 1.0
        }
        return {"places": list(self.needs.path), "whole_model_divergence": whole}
