"""Gradients of the divergence in models on the way from W to Q(W), all units at once.

For a candidate c, every unit is moved to W + t (Q_c(W) - W) together, and one forward and one
backward pass of the rows give the gradient of L = mean over rows of the answer of
KL(dense || model there) by every weight. L needs no labels and its gradient at t = 0 is exactly 0.
A gradient is as large as the model, so only two numbers per layer are kept, with d = Q(W) - W, read
off the weights that the model holds at t (in its own type), which spares rounding them again:

    along = sum_ki g_ki d_ki          magnitude = sum_ki |g_ki d_ki|

Used by `taylor-quantized`, `taylor-integrated` and `delta-loss`, which share what they both need.

Cost: per candidate and place one forward pass and two backward passes' worth of products (inputs'
and weights' gradients) over `PATH_TOKENS` tokens. Memory: two copies of the weights of all units
(the dense ones and the gradients) beside the model. Limits: a few hundred tokens; the gradient is
that of a model in which all other units are rounded to the same candidate as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.calibration.objective import Objective
from cptq.calibration.replay import forward
from cptq.calibration.slices import Rows, token_count
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.errors import CalibrationError
from cptq.sensitivity.rounding import Rounding, changes
from cptq.types import Candidate, Emit, Progress, Unit

#: tokens that flow through the model at each place
PATH_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """g . d and |g| . |d| of one unit at one place, per row of the answer."""

    along: float
    magnitude: float


@dataclass(slots=True, kw_only=True, eq=False)
class PathGradients:
    """`terms` by (candidate, place) and unit; `divergence` of the whole model by the same."""

    terms: dict[tuple[Candidate, float], dict[str, Term]]
    divergence: dict[tuple[Candidate, float], float]
    tokens: int


def path_gradients(
    model: LoadedModel,
    rows: Sequence[Rows],
    objective: Objective,
    rounding: Rounding,
    *,
    candidates: Sequence[Candidate],
    places: Sequence[float],
    emit: Emit,
) -> PathGradients:
    """Run the passes.

    Args:
        model: the dense model; left as it was, to the bit.
        rows: calibration batches, all of which flow through it at every place.
        objective: how the model is judged.
        rounding: gives W - Q(W).
        candidates: dense ones without sparsity are left out.
        places: t in (0, 1], 1 being the rounded model.
        emit: takes progress.

    Raises:
        CalibrationError: an answer or a gradient is NaN or infinite.
    """
    steps = [(c, t) for c in candidates if changes(c) for t in places]
    emit(Progress(stage="gradients", done=0, total=len(steps), message="the dense model"))
    walk = _Walk(model, rows, objective, rounding)
    found = PathGradients(terms={}, divergence={}, tokens=token_count(rows))
    with walk.tracked():
        for done, (candidate, place) in enumerate(steps):
            message = f"{candidate.label} at {place:g}"
            emit(Progress(stage="gradients", done=done, total=len(steps), message=message))
            key = candidate, place
            found.terms[key], found.divergence[key] = walk.at(candidate, place)
    emit(Progress(stage="gradients", done=len(steps), total=len(steps)))
    return found


class _Walk:
    """The dense weights and answers, and the way to any place and back."""

    def __init__(
        self, model: LoadedModel, rows: Sequence[Rows], objective: Objective, rounding: Rounding
    ) -> None:
        self._model, self._rows = model, list(rows)
        self._objective, self._rounding = objective, rounding
        self._modules = {s.name: model.linear(s.name) for u in model.units for s in u.layers}
        self._dense = {name: get_weight(m).clone() for name, m in self._modules.items()}
        with torch.no_grad():
            answers = [objective.answer(forward(model, row), row) for row in self._rows]
        self._reference = [objective.reference(answer_RV) for answer_RV in answers]
        self._count = sum(len(answer_RV) for answer_RV in answers)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Only the units' weights take gradients; weights and flags are back afterwards."""
        flags = [(p, p.requires_grad) for p in self._model.module.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for module in self._modules.values():
                _weight(module).requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for name, module in self._modules.items():
                set_weight(module, self._dense[name])
                _weight(module).grad = None

    def at(self, candidate: Candidate, place: float) -> tuple[dict[str, Term], float]:
        """Terms by unit, and the divergence, at one place."""
        for unit in self._model.units:
            for spec, dW_OI in zip(unit.layers, self._errors(unit, candidate), strict=True):
                W_OI = self._dense[spec.name]
                moved_OI = torch.sub(W_OI.float(), dW_OI, alpha=place)
                set_weight(self._modules[spec.name], moved_OI)
                _weight(self._modules[spec.name]).grad = None
        divergence = sum(self._pass(index) for index in range(len(self._rows))) / self._count
        return {unit.name: self._term(unit, place) for unit in self._model.units}, divergence

    def _errors(self, unit: Unit, candidate: Candidate) -> tuple[Tensor, ...]:
        weights = [self._dense[spec.name].float() for spec in unit.layers]
        return self._rounding.errors(unit, weights, candidate)

    def _pass(self, index: int) -> float:
        """Forward and backward of one batch; the sum of its rows' divergences."""
        reference_RV, row = self._reference[index], self._rows[index]
        answer_RV = self._objective.answer(forward(self._model, row), row)
        slope_RV = self._objective.slope(reference_RV, answer_RV)
        if not bool(torch.isfinite(slope_RV).all()):
            raise _not_finite("output of the rounded model")
        answer_RV.backward(slope_RV.to(answer_RV.dtype))
        return float(self._objective.divergence(reference_RV, answer_RV.detach()).sum())

    def _term(self, unit: Unit, place: float) -> Term:
        along = magnitude = 0.0
        for spec in unit.layers:
            module = self._modules[spec.name]
            g_OI = _gradient(module)
            if g_OI is None:
                continue  # it never ran: the driver skips it and says so
            moved_OI = get_weight(module).float() - self._dense[spec.name].float()
            product_OI = moved_OI.mul_(g_OI.float())
            along += float(product_OI.sum()) / place
            magnitude += float(product_OI.abs_().sum()) / place
        if along != along or magnitude == float("inf"):
            raise _not_finite(f"gradient of {unit.name}")
        return Term(along=along / self._count, magnitude=magnitude / self._count)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _gradient(module: nn.Module) -> Tensor | None:
    """(out, in), as `get_weight`."""
    gradient = _weight(module).grad
    return gradient.T if gradient is not None and isinstance(module, Conv1D) else gradient


def _not_finite(what: str) -> CalibrationError:
    return CalibrationError(
        f"the {what} holds NaN or infinity on the calibration text",
        hint="run in --dtype float32, or check the checkpoint for damaged weights",
    )
