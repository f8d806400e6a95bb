"""Metrics made of gradients on the path from W to Q(W), all units at once: passes and base class.

For a candidate c every unit is moved to W + t (Q_c(W) - W) together, and one forward and one
backward pass of the rows give the gradient by every weight of L = mean over output rows of
KL(dense || model there). L needs no labels, and its gradient at t = 0 is exactly 0. A gradient is
as large as the model, so only two numbers per layer are kept, with d = Q(W) - W as the model holds
it at t (in its own type), which saves rounding W again:

    directional = sum_ki g_ki d_ki          absolute = sum_ki |g_ki d_ki|

Used by `taylor-quantized`, `taylor-integrated` and `delta-loss`, which share the points that they
both need.

Cost: per candidate and point one forward pass and two backward passes' worth of products (inputs'
and weights' gradients) over `PATH_TOKENS` tokens. Memory: two copies of the weights of all units
(the dense ones and the gradients) beside the model. Limits: a few hundred tokens; the gradient is
that of a model in which all other units are rounded to the same candidate as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.calibration.batches import Batch, count_tokens
from cptq.calibration.objective import Objective
from cptq.calibration.replay import forward
from cptq.calibration.samples import build_not_finite_error
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.sensitivity.metric import Metric, UnitView
from cptq.sensitivity.rounding import NearestRounding, changes_weights
from cptq.types import Candidate, Emit, Progress, Unit

#: tokens that flow through the model at each point
PATH_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """g . d and |g| . |d| of one unit at one point, per output row."""

    directional: float
    absolute: float


@dataclass(slots=True, kw_only=True, eq=False)
class PathGradients:
    """`terms` by (candidate, point) and unit; `divergence` of the whole model by the same."""

    terms: dict[tuple[Candidate, float], dict[str, Term]]
    divergence: dict[tuple[Candidate, float], float]
    tokens: int


class PathMetric(Metric):
    """A metric made of the terms at the points of `needs.path`.

    The candidate-free number of a unit is its mean score over the candidates that change it.
    """

    @property
    def score_unit(self) -> str:
        return self.context.objective.unit

    @abstractmethod
    def combine(self, terms: list[Term]) -> float:
        """Return the score from a unit's terms at each point, in the order of `needs.path`."""

    def measure_unit(self, view: UnitView) -> float:
        """Return the mean score over the candidates."""
        scores = [self._score(view, c) for c in self.context.candidates if changes_weights(c)]
        return sum(scores) / max(len(scores), 1)

    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the score of one candidate in a model whose other units are stored as it, too."""
        return self._score(view, candidate)

    def _score(self, view: UnitView, candidate: Candidate) -> float:
        path = self.context.path
        assert path is not None
        return self.combine(
            [path.terms[candidate, point][view.unit.name] for point in self.needs.path]
        )

    def collect_details(self) -> dict[str, Any]:
        """Return the whole model's divergence at each candidate, to which the scores add up."""
        path = self.context.path
        assert path is not None
        whole = {
            candidate.label: divergence
            for (candidate, point), divergence in path.divergence.items()
            if point == 1.0
        }
        return {"places": list(self.needs.path), "whole_model_divergence": whole}


def compute_path_gradients(
    model: LoadedModel,
    rows: Sequence[Batch],
    objective: Objective,
    rounding: NearestRounding,
    *,
    candidates: Sequence[Candidate],
    points: Sequence[float],
    emit: Emit,
) -> PathGradients:
    """Run the passes.

    Args:
        model: the dense model; left as it was, to the bit.
        rows: calibration batches, all of which flow through it at every point.
        objective: how the model is judged.
        rounding: gives W - Q(W).
        candidates: dense ones without sparsity are left out.
        points: t in (0, 1], 1 being the rounded model.
        emit: takes progress.

    Raises:
        CalibrationError: an output or a gradient is NaN or infinite.
    """
    steps = [(c, t) for c in candidates if changes_weights(c) for t in points]
    emit(Progress(stage="gradients", done=0, total=len(steps), message="the dense model"))
    passes = _PathPasses(model, rows, objective, rounding)
    found = PathGradients(terms={}, divergence={}, tokens=count_tokens(rows))
    with passes.track_gradients():
        for done, (candidate, point) in enumerate(steps):
            message = f"{candidate.label} at {point:g}"
            emit(Progress(stage="gradients", done=done, total=len(steps), message=message))
            key = candidate, point
            found.terms[key], found.divergence[key] = passes.evaluate(candidate, point)
    emit(Progress(stage="gradients", done=len(steps), total=len(steps)))
    return found


class _PathPasses:
    """The dense weights and outputs, and the passes at any point of the path."""

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Batch],
        objective: Objective,
        rounding: NearestRounding,
    ) -> None:
        self._model, self._rows = model, list(rows)
        self._objective, self._rounding = objective, rounding
        self._modules = {s.name: model.linear(s.name) for u in model.units for s in u.layers}
        self._dense = {name: get_weight(m).clone() for name, m in self._modules.items()}
        with torch.no_grad():
            outputs = [objective.select_rows(forward(model, row), row) for row in self._rows]
        self._reference = [objective.compute_reference(z_RV) for z_RV in outputs]
        self._count = sum(len(z_RV) for z_RV in outputs)

    @contextmanager
    def track_gradients(self) -> Iterator[None]:
        """Track gradients of the units' weights only; restore weights and flags afterwards."""
        flags = [(p, p.requires_grad) for p in self._model.module.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for module in self._modules.values():
                _get_parameter(module).requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for name, module in self._modules.items():
                set_weight(module, self._dense[name])
                _get_parameter(module).grad = None

    def evaluate(self, candidate: Candidate, point: float) -> tuple[dict[str, Term], float]:
        """Return the terms by unit, and the divergence, at one point."""
        for unit in self._model.units:
            for spec, dW_OI in zip(unit.layers, self._round(unit, candidate), strict=True):
                W_OI = self._dense[spec.name]
                moved_OI = torch.sub(W_OI.float(), dW_OI, alpha=point)
                set_weight(self._modules[spec.name], moved_OI)
                _get_parameter(self._modules[spec.name]).grad = None
        divergence = sum(self._run_batch(index) for index in range(len(self._rows))) / self._count
        return {
            unit.name: self._compute_term(unit, point) for unit in self._model.units
        }, divergence

    def _round(self, unit: Unit, candidate: Candidate) -> tuple[Tensor, ...]:
        weights = [self._dense[spec.name].float() for spec in unit.layers]
        return self._rounding.compute_errors(unit, weights, candidate)

    def _run_batch(self, index: int) -> float:
        """Run one batch forward and backward; return the sum of its rows' divergences."""
        reference_RV, row = self._reference[index], self._rows[index]
        z_RV = self._objective.select_rows(forward(self._model, row), row)
        gradient_RV = self._objective.compute_gradient(reference_RV, z_RV)
        if not bool(torch.isfinite(gradient_RV).all()):
            raise build_not_finite_error("the output of the rounded model")
        z_RV.backward(gradient_RV.to(z_RV.dtype))
        return float(self._objective.compute_divergence(reference_RV, z_RV.detach()).sum())

    def _compute_term(self, unit: Unit, point: float) -> Term:
        directional = absolute = 0.0
        for spec in unit.layers:
            module = self._modules[spec.name]
            g_OI = _get_gradient(module)
            if g_OI is None:
                continue  # it never ran: the driver skips it with a notice
            # the model has moved by t d: divide by t below
            moved_OI = get_weight(module).float() - self._dense[spec.name].float()
            product_OI = moved_OI.mul_(g_OI.float())
            directional += float(product_OI.sum()) / point
            absolute += float(product_OI.abs_().sum()) / point
        if directional != directional or absolute == float("inf"):
            raise build_not_finite_error(f"the gradient of {unit.name}")
        return Term(directional=directional / self._count, absolute=absolute / self._count)


def _get_parameter(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _get_gradient(module: nn.Module) -> Tensor | None:
    """Return the weight's gradient as (out, in), as `get_weight` does the weight."""
    gradient = _get_parameter(module).grad
    return gradient.T if gradient is not None and isinstance(module, Conv1D) else gradient
