"""A trial model: any choice of candidates, set unit by unit, and dense again at the end.

To compare plans, units are compressed one by one on the DENSE model's activations and kept; trying
a choice then only puts kept weights in place. A layer is compressed by the same `compress_layer` as
in `compress_model`, so the weights are those that are shipped wherever the Hessian is the same:
always for a compressor that uses no activations. For others (GPTQ, and the masks of sparse
candidates) one thing differs: a block does not see the errors of the blocks before it. So a search
uses the trial model, and what is written is compressed anew.

Cost: each (unit, candidate) once, when it is first needed. Memory: the Hessians
(in^2 floats per unit, only for compressors that use activations; with `solve` those of one unit at
a time), the codes of everything tried (1 byte a weight, and another for the mask of a sparse
candidate), which go to files beyond the limit of the model's spill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_stored_weight, set_weight
from cptq.compression import COMPRESSORS
from cptq.compression.layer import compress_layer
from cptq.compression.restored import KeptLayer, Restored, move_layer, restore_layers
from cptq.compression.scores import USUAL_MASKING, Masking
from cptq.compression.vocabulary import choose_compressor, is_head
from cptq.layouts import Layout
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import Candidate, CompressedLayer, Emit, LayerSpec, Progress, Unit

#: fewest units compressed for one choice whose progress is reported
MANY = 8
CPU = torch.device("cpu")


class TrialModel:
    """Weights of units at candidates, and the model in which they are tried.

    Args:
        model: dense now; `restore_after` leaves it so.
        compressor: a name of `COMPRESSORS`.
        emit: takes progress.
        hessians: {unit name: H_II} on the dense model's activations; a unit without one is
            compressed as if its inputs were independent and equal.
        measure_heads: gives those of output heads when one is first compressed, unless
            `take_head_moment` was called before.
        layout, float16_scales, masking: as `compress_model` takes them;
            the weights tried are those shipped.
    """

    def __init__(
        self,
        model: LoadedModel,
        compressor: str,
        emit: Emit,
        hessians: Mapping[str, Tensor] | None = None,
        *,
        layout: Layout,
        float16_scales: bool,
        masking: Masking = USUAL_MASKING,
        measure_heads: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model = model
        self._layout, self._float16_scales, self._masking = layout, float16_scales, masking
        self._emit = emit
        self._method = COMPRESSORS.get(compressor)
        self._hessians, self._measure_heads = dict(hessians or {}), measure_heads
        self._units = {unit.name: unit for unit in model.all_units}
        self._made: dict[tuple[str, Candidate], list[KeptLayer]] = {}
        self._now: dict[str, Candidate] = {}

    def take_head_moment(self, H_II: Tensor) -> None:
        """Compress output heads on this second moment of what they are given."""
        self._hessians |= {u.name: H_II for u in self.model.vocabulary if is_head(u)}
        self._measure_heads = None

    @torch.no_grad()
    def solve(self, unit: Unit, H_II: Tensor | None, candidates: Iterable[Candidate]) -> None:
        """Compress a unit at some candidates on its Hessian, which is not kept."""
        if H_II is not None:
            self._hessians[unit.name] = H_II
        for candidate in candidates:
            self._keep(unit, candidate)
        if H_II is not None:
            del self._hessians[unit.name]

    @contextmanager
    def restore_after(self) -> Iterator[None]:
        """Allow `apply_choices` inside; afterwards the model is dense again, to the bit."""
        try:
            yield
        finally:
            self.model.restore_dense()
            self._now = {}

    def apply_choices(self, choices: Mapping[str, Candidate]) -> None:
        """Set the model to a choice; only units that differ from now are touched."""
        self._prepare(choices)
        for name, candidate in choices.items():
            if self._now.get(name, Candidate(bits=16)) != candidate:
                self._apply(self._units[name], candidate)
                self._now[name] = candidate

    def _apply(self, unit: Unit, candidate: Candidate) -> None:
        if not candidate.dense:
            restore_layers(self.model, self._made[unit.name, candidate])
            return
        for spec in unit.layers:
            set_weight(self.model.linear(spec.name), self._source(spec))

    def _prepare(self, choices: Mapping[str, Candidate]) -> None:
        """Compress what no choice before needed; report progress where it takes a while."""
        new = [
            (name, candidate)
            for name, candidate in choices.items()
            if not candidate.dense and (name, candidate) not in self._made
        ]
        for index, (name, candidate) in enumerate(new):
            if len(new) > MANY:
                self._emit(Progress(stage="units", done=index, total=len(new), message=name))
            self._keep(self._units[name], candidate)
        if len(new) > MANY:
            self._emit(Progress(stage="units", done=len(new), total=len(new)))

    @torch.no_grad()
    def weights(self, unit: Unit, candidate: Candidate) -> dict[str, Tensor]:
        """Return {layer name: W_OI} of a unit at a candidate, in the model's type, and keep it."""
        if candidate.dense:
            return {spec.name: self._source(spec) for spec in unit.layers}
        return self._multiply_out(self._keep(unit, candidate))

    @torch.no_grad()
    def _keep(self, unit: Unit, candidate: Candidate) -> list[KeptLayer]:
        """Return the layers of a unit at a candidate that is not dense, and keep them."""
        key = (unit.name, candidate)
        if key not in self._made:
            # not on a GPU, where the codes of many candidates may have no room beside the model
            made = [move_layer(layer, CPU) for layer in self._compress(unit, candidate)]
            self._made[key] = [KeptLayer(layer, self.model.spill) for layer in made]
        return self._made[key]

    @torch.no_grad()
    def compute_weights(self, unit: Unit, candidate: Candidate) -> dict[str, Tensor]:
        """Return the same for a candidate that is not dense, and keep nothing."""
        return self._multiply_out(self._compress(unit, candidate))

    def _multiply_out(self, layers: Iterable[CompressedLayer | KeptLayer]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {layer.spec.name: Restored(layer, device, dtype)() for layer in layers}

    def _source(self, spec: LayerSpec) -> Tensor:
        """Return the dense weight, whatever the module holds now."""
        return get_stored_weight(self.model.linear(spec.name))

    def _choose_layout(self, spec: LayerSpec, candidate: Candidate) -> Layout:
        """Return what counts the bytes: another runtime's candidate is scored as well."""
        held = self._layout.explain_refusal(spec, candidate) is None
        return self._layout if held else PACK_QUANTIZED

    def _compress(self, unit: Unit, candidate: Candidate) -> list[CompressedLayer]:
        outer = unit.block is None
        if outer and self._measure_heads is not None and is_head(unit):
            self._hessians |= self._measure_heads()
            self._measure_heads = None
        method = choose_compressor(unit, self._method) if outer else self._method
        return [
            compress_layer(
                spec,
                self._source(spec) if outer else self._source(spec).float(),
                self._hessians.get(unit.name),
                candidate,
                method,
                self._choose_layout(spec, candidate),
                float16_scales=self._float16_scales,
                masking=self._masking,
                measure_output=False,
            )
            for spec in unit.layers
        ]
