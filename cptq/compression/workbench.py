"""A model under any choice of candidates, changed unit by unit and dense again at the end.

To compare plans, units are compressed one by one on the DENSE model's activations and kept; a
choice is then only a matter of putting kept weights in place. For a compressor that looks at no
activations that is exactly what `compress_model` makes. For one that does (GPTQ, and the masks of
sparse candidates) it differs in one thing: a block does not see the errors of those before it. So
a search can use it, and what is written is compressed anew.

Cost: each (unit, candidate) once, when it is first asked for. Memory: the dense weights, the
Hessians (in^2 floats per unit, only for compressors that look at activations), the codes of what
was tried (1 byte a weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import COMPRESSORS
from cptq.compression.problem import Solution, layer_problem
from cptq.numerics.asymmetric import dequantize_asymmetric
from cptq.numerics.grid import dequantize
from cptq.types import Candidate, Emit, LayerSpec, Progress, Unit

#: units compressed for one choice from which on their progress is told
MANY = 8


class Workbench:
    """Weights of units at candidates, and the model that they are tried in.

    Args:
        model: dense now; `trying` leaves it so.
        compressor: a name of `COMPRESSORS`.
        emit: takes progress.
        hessians: {unit name: H_II} on the dense model's activations; a unit without one is
            compressed as if its inputs were independent and equal.
    """

    def __init__(
        self,
        model: LoadedModel,
        compressor: str,
        emit: Emit,
        hessians: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self._emit = emit
        self._method = COMPRESSORS.get(compressor)
        self._hessians = hessians or {}
        self._units = {unit.name: unit for unit in model.units}
        self._made: dict[tuple[str, Candidate], list[Solution]] = {}
        self._dense: dict[str, Tensor] = {}
        self._now: dict[str, Candidate] = {}

    @contextmanager
    def trying(self) -> Iterator[None]:
        """`settle` may be called inside; afterwards the model is dense, to the bit."""
        self._dense = {
            spec.name: get_weight(self.model.linear(spec.name)).clone()
            for unit in self.model.units
            for spec in unit.layers
        }
        try:
            yield
        finally:
            for name, W_OI in self._dense.items():
                set_weight(self.model.linear(name), W_OI)
            self._dense, self._now = {}, {}

    def settle(self, choices: Mapping[str, Candidate]) -> None:
        """Put the model into the state of a choice; only what differs from now is touched."""
        self._prepare(choices)
        for name, candidate in choices.items():
            if self._now.get(name, Candidate(bits=16)) != candidate:
                for layer, W_OI in self.weights(self._units[name], candidate).items():
                    set_weight(self.model.linear(layer), W_OI)
                self._now[name] = candidate

    def _prepare(self, choices: Mapping[str, Candidate]) -> None:
        """Compress what a choice has and no one before; says so where it takes a while."""
        new = [
            (name, candidate)
            for name, candidate in choices.items()
            if not candidate.dense and (name, candidate) not in self._made
        ]
        for index, (name, candidate) in enumerate(new):
            if len(new) > MANY:
                self._emit(Progress(stage="units", done=index, total=len(new), message=name))
            self.weights(self._units[name], candidate)
        if len(new) > MANY:
            self._emit(Progress(stage="units", done=len(new), total=len(new)))

    @torch.no_grad()
    def weights(self, unit: Unit, candidate: Candidate) -> dict[str, Tensor]:
        """{layer name: W_OI} of a unit at a candidate, in the model's type."""
        if candidate.dense:
            return {spec.name: self._source(spec) for spec in unit.layers}
        key = (unit.name, candidate)
        if key not in self._made:
            self._made[key] = [self._compress(unit, spec, candidate) for spec in unit.layers]
        return {
            spec.name: _multiplied_out(made, self.model.dtype)
            for spec, made in zip(unit.layers, self._made[key], strict=True)
        }

    def _source(self, spec: LayerSpec) -> Tensor:
        """The dense weight, whatever the module holds now."""
        known = self._dense.get(spec.name)
        return get_weight(self.model.linear(spec.name)) if known is None else known

    def _compress(self, unit: Unit, spec: LayerSpec, candidate: Candidate) -> Solution:
        W_OI = self._source(spec).float()
        H_II = self._hessians.get(unit.name)
        H_II = torch.eye(spec.shape[1], device=W_OI.device) if H_II is None else H_II
        return self._method(layer_problem(W_OI, H_II, spec, candidate))


def _multiplied_out(made: Solution, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of codes on a grid with or without zero points."""
    if made.zero_OG is None:
        return dequantize(made.codes_OI, made.scale_OG, dtype)
    return dequantize_asymmetric(made.codes_OI, made.scale_OG, made.zero_OG, dtype)
