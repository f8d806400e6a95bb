"""Metrics made of gradients on the path from W to Q(W), all units at once: passes and base class.

For a candidate c every unit is moved to W + t (Q_c(W) - W) together, and one forward and one
backward pass of the rows give the gradient by every weight of L = mean over output rows of
KL(dense || model there). L needs no labels, and its gradient at t = 0 is exactly 0. A gradient is
as large as the model, so only two numbers per layer are kept, with d = Q(W) - W as the model holds
it at t (in its own type):

    directional = sum_ki g_ki d_ki          absolute = sum_ki |g_ki d_ki|

The passes go from block to block (cptq.calibration.block_chain). A block's weights are moved while
all rows pass it, forward and later back, and are dense otherwise: both passes see the model with
all units moved, and neither it nor its gradient ever exists as a whole.

Used by `taylor-quantized`, `taylor-integrated` and `delta-loss`, which share the points that they
both need.

Cost: per candidate and point two forward passes and two backward passes' worth of products (inputs'
and weights' gradients) over `PATH_TOKENS` tokens; the weights are encoded twice, on grids that are
fitted once. Memory: three copies of the weights of one block (dense, d, gradients), the grids of
all units (cptq.sensitivity.rounding), and a hidden state per token and block. Limits: a few hundred
tokens; the gradient is that of a model in which all other units are rounded to the same candidate
as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.calibration.batches import Batch, count_tokens
from cptq.calibration.block_chain import BlockChain, find_unit_blocks
from cptq.calibration.finite import build_not_finite_error
from cptq.calibration.objective import Objective
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, replace_weight
from cptq.numerics.reproducible import compute_total
from cptq.sensitivity.metric import Metric, UnitView
from cptq.sensitivity.rounding import NearestRounding, changes_weights
from cptq.types import Candidate, Emit, Keep, Progress, Unit, keep_nothing

#: ({unit: (directional, absolute)}, divergence) of one point, of plain types as `Keep` wants
_Evaluation = tuple[dict[str, tuple[float, float]], float]
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
    keep: Keep = keep_nothing,
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
        keep: keeps each point.

    Raises:
        CalibrationError: an output or a gradient is NaN or infinite.
    """
    steps = [(c, t) for c in candidates if changes_weights(c) for t in points]
    emit(Progress(stage="gradients", done=0, total=len(steps), message="the dense model"))
    prepare = cache(lambda: _PathPasses(model, rows, objective, rounding))
    found = PathGradients(terms={}, divergence={}, tokens=count_tokens(rows))
    for done, (candidate, point) in enumerate(steps):
        message = f"{candidate.label} at {point:g}"
        emit(Progress(stage="gradients", done=done, total=len(steps), message=message))

        step = f"gradients-{candidate.label}-{point:g}"
        pairs, divergence = keep(step, partial(_evaluate_plainly, prepare, candidate, point))
        terms = {unit: Term(directional=d, absolute=a) for unit, (d, a) in pairs.items()}
        found.terms[candidate, point] = terms
        found.divergence[candidate, point] = divergence
    emit(Progress(stage="gradients", done=len(steps), total=len(steps)))
    return found


def _evaluate_plainly(
    prepare: Callable[[], _PathPasses], candidate: Candidate, point: float
) -> _Evaluation:
    terms, divergence = prepare().evaluate(candidate, point)
    return {unit: (term.directional, term.absolute) for unit, term in terms.items()}, divergence


class _PathPasses:
    """The dense model's outputs, and the passes at any point of the path, block by block."""

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Batch],
        objective: Objective,
        rounding: NearestRounding,
    ) -> None:
        self._model, self._rows = model, list(rows)
        self._objective, self._rounding = objective, rounding
        self._chain = BlockChain(model, rows)
        self._where = list(zip(model.units, find_unit_blocks(model), strict=True))
        self._reference = self._run_dense()
        self._count = sum(len(reference_RV) for reference_RV in self._reference)

    @torch.no_grad()
    def _run_dense(self) -> list[Tensor]:
        """Return what divergences are measured from, batch by batch."""
        self._chain.embed()
        for block in range(self._chain.blocks):
            self._run_block(block, keep=False)
        return [
            self._objective.compute_reference(
                self._objective.select_rows(self._chain.finish(index), row)
            )
            for index, row in enumerate(self._rows)
        ]

    def _run_block(self, block: int, *, keep: bool) -> None:
        for _hidden in self._chain.forward_block(block, keep=keep):
            pass

    def evaluate(self, candidate: Candidate, point: float) -> tuple[dict[str, Term], float]:
        """Return the terms by unit, and the divergence, at one point."""
        self._chain.embed()
        for block in range(self._chain.blocks):
            with self._move_block(block, candidate, point):
                self._run_block(block, keep=True)
        distances: list[float] = []
        self._chain.turn_around(partial(self._judge, distances))
        gradients: dict[str, Tensor] = {}
        terms: dict[str, Term] = {}
        for block in reversed(range(self._chain.blocks)):
            with self._move_block(block, candidate, point) as changes:
                self._go_back(block, gradients)
                for unit, blocks in self._where:
                    if block == min(blocks):
                        terms[unit.name] = self._compute_term(unit, changes, gradients, point)
        return terms, sum(distances) / self._count

    @contextmanager
    def _move_block(
        self, block: int, candidate: Candidate, point: float
    ) -> Iterator[dict[str, Tensor]]:
        """Move the weights of one block; yield {layer: t d}, as the model holds it, (out, in)."""
        changes: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for unit in self._list_units(block):
                modules = [self._model.linear(spec.name) for spec in unit.layers]
                weights = [get_weight(module).float() for module in modules]
                errors = self._rounding.compute_errors(unit, weights, candidate)
                for spec, W_OI, dW_OI in zip(unit.layers, weights, errors, strict=True):
                    moved_OI = torch.sub(W_OI, dW_OI, alpha=point).to(self._model.dtype)
                    changes[spec.name] = moved_OI.float() - W_OI
                    stack.enter_context(replace_weight(self._model.linear(spec.name), moved_OI))
            yield changes

    def _list_units(self, block: int) -> list[Unit]:
        return [unit for unit, blocks in self._where if block in blocks]

    def _judge(
        self, distances: list[float], batch: int, output: Any, _positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output rows and the gradient of their divergence; add that to `distances`."""
        reference_RV = self._reference[batch]
        z_RV = self._objective.select_rows(output, self._rows[batch])
        gradient_RV = self._objective.compute_gradient(reference_RV, z_RV)
        if not bool(torch.isfinite(gradient_RV).all()):
            raise build_not_finite_error("the output of the rounded model")
        rows = self._objective.compute_divergence(reference_RV, z_RV.detach())
        distances.append(float(rows.sum()))
        return z_RV, gradient_RV

    def _go_back(self, block: int, gradients: dict[str, Tensor]) -> None:
        """Pull gradients back through a block; add those by its weights, (out, in)."""
        names = [spec.name for unit in self._list_units(block) for spec in unit.layers]
        modules = [self._model.linear(name) for name in names]
        with ExitStack() as stack:
            stack.enter_context(self._model.hold(block))
            for module in modules:
                stack.enter_context(_track_gradient(module))
            parameters = [_get_parameter(module) for module in modules]
            found = self._chain.backward_block(block, parameters)
        for name, module, gradient in zip(names, modules, found, strict=True):
            if gradient is not None:
                g_OI = gradient.T if isinstance(module, Conv1D) else gradient
                gradients[name] = gradients[name] + g_OI if name in gradients else g_OI

    def _compute_term(
        self,
        unit: Unit,
        changes: Mapping[str, Tensor],
        gradients: dict[str, Tensor],
        point: float,
    ) -> Term:
        directional = absolute = 0.0
        for spec in unit.layers:
            g_OI = gradients.pop(spec.name, None)
            if g_OI is None:
                continue  # it never ran: the driver skips it with a notice
            # the model has moved by t d: divide by t below
            product_OI = changes[spec.name] * g_OI.float()
            directional += float(compute_total(product_OI)) / point
            absolute += float(compute_total(product_OI.abs_())) / point
        if directional != directional or absolute == float("inf"):
            raise build_not_finite_error(f"the gradient of {unit.name}")
        return Term(directional=directional / self._count, absolute=absolute / self._count)


def _get_parameter(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def _track_gradient(module: nn.Module) -> Iterator[None]:
    """Let the weight require a gradient."""
    flag = _get_parameter(module).requires_grad
    _get_parameter(module).requires_grad_(True)
    try:
        yield
    finally:
        _get_parameter(module).requires_grad_(flag)
