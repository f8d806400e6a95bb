"""The cost model: the exact bytes on disk of any choice of candidates. Nothing else counts bytes.

A GGUF file's bytes are a plain sum (`cptq.layouts.gguf`). A checkpoint's are not. It is a
safetensors file (or shards): 8 bytes of header length, a JSON header, the tensors. The header
counts too, and its size depends on the choice: a packed layer has three entries where a dense one
has one, and offsets have more or fewer digits. So the size of a whole file is not a sum over units.
It is computed exactly, by the code that the writer uses (`cptq.layouts.safetensors_header`);
`ledger` encloses it in sums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, Runtime
from cptq.errors import PlanError
from cptq.layouts import Layout
from cptq.layouts.gguf import BLOCK, GgufSizes, align, count_block_bytes
from cptq.layouts.groups import resolve_group
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.safetensors_header import SHARD_BYTES, Entry, measure, sum_bytes
from cptq.types import (
    DTYPE_BYTES,
    Candidate,
    LayerSpec,
    SizeReport,
    TensorSpec,
    Unit,
    choose_16bit_dtype,
)

Choices = Mapping[str, Candidate]


class CostModel:
    """The bytes of every choice for one model.

    Args:
        units: the compressible units.
        tensors: all tensors of a dense artifact, without tied duplicates.
        layout: how the file format stores a compressed layer.
        runtime: what the program that will load the file supports.
        gguf: what a GGUF file holds beside packed weights, where that is the file to count.
        shard_bytes: most bytes of tensors in one weight file.

    Raises:
        PlanError: a unit has a layer whose weight is not among the tensors.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        tensors: Sequence[TensorSpec],
        layout: Layout = PACK_QUANTIZED,
        runtime: Runtime = RUNTIMES[DEFAULT_RUNTIME],
        gguf: GgufSizes | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.units = tuple(units)
        self.tensors = tuple(tensors)
        self.layout = layout
        self.runtime = runtime
        self.gguf = gguf
        self.shard_bytes = shard_bytes
        self._unit = {unit.name: unit for unit in self.units}
        self._specs: dict[tuple[str, Candidate], tuple[TensorSpec, ...]] = {}
        self._entries: dict[tuple[str, Candidate], list[tuple[Entry, ...]]] = {}
        self._dense_entries: dict[str, tuple[Entry, ...]] = {
            spec.name: (measure(spec),) for spec in self.tensors
        }
        known = {spec.name for spec in self.tensors}
        for unit in self.units:
            for layer in unit.layers:
                if layer.weight_name not in known:
                    raise PlanError(f"{layer.weight_name} is not among the checkpoint's tensors")

    def list_unit_tensors(self, unit_name: str, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """Return the tensors that a unit's weights become.

        Raises:
            PlanError: there is no such unit, or the format cannot hold the candidate.
        """
        known = self._specs.get((unit_name, candidate))
        if known is None:
            layers = self._layers(unit_name)
            known = tuple(chain.from_iterable(self._layer(layer, candidate) for layer in layers))
            self._specs[unit_name, candidate] = known
        return known

    def _layer(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        return list_layer_tensors(layer, candidate, self.layout)

    def explain_refusal(self, unit_name: str, candidate: Candidate) -> str | None:
        """Return why format or runtime refuse a candidate for a unit; None if they accept it."""
        if candidate.dense:
            return None
        for layer in self._layers(unit_name):
            why = explain_layer_refusal(layer, candidate, self.layout, self.runtime)
            if why is not None:
                return why
        return None

    def options(self, unit_name: str, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Return the candidates that a unit can have; dense alone if it can have none of them."""
        taken = tuple(c for c in candidates if self.explain_refusal(unit_name, c) is None)
        return taken or (Candidate(bits=16),)

    def check_pinned(self, options: Mapping[str, Sequence[Candidate]]) -> None:
        """Check that every unit left with a single candidate can have it.

        Raises:
            PlanError: a unit cannot; the message gives the reason.
        """
        for unit, row in options.items():
            why = self.explain_refusal(unit, row[0]) if len(row) == 1 else None
            if why is not None:
                raise PlanError(
                    f"{unit} is pinned to {row[0].label}: {why}",
                    hint="pin it to a width that the runtime supports, or name another --runtime",
                )

    def _layers(self, unit_name: str) -> tuple[LayerSpec, ...]:
        unit = self._unit.get(unit_name)
        if unit is None:
            raise PlanError(
                f"the model has no unit {unit_name!r}",
                allowed=f"{len(self.units)} names such as {', '.join(list(self._unit)[:3])}",
            )
        return unit.layers

    def count_unit_bytes(self, unit_name: str, candidate: Candidate) -> int:
        """Return the bytes of a unit's tensors, without their entries in the header."""
        if self.gguf is not None:
            tensors = self.list_unit_tensors(unit_name, candidate)
            dense = self.gguf.dense if candidate.dense else {}
            return sum(dense.get(spec.name, align(spec.nbytes)) for spec in tensors)
        return sum(entry.nbytes for entry in self.list_unit_entries(unit_name, candidate))

    def list_unit_entries(self, unit_name: str, candidate: Candidate) -> tuple[Entry, ...]:
        """Return `unit_tensors` as entries of the header."""
        return tuple(chain.from_iterable(self._list_entries(unit_name, candidate)))

    def _list_entries(self, unit_name: str, candidate: Candidate) -> list[tuple[Entry, ...]]:
        """Return the entries of each layer of a unit."""
        known = self._entries.get((unit_name, candidate))
        if known is None:
            layers = self._layers(unit_name)
            known = [tuple(map(measure, self._layer(layer, candidate))) for layer in layers]
            self._entries[unit_name, candidate] = known
        return known

    def list_other_entries(self, names: Collection[str]) -> list[Entry]:
        """Return the entries of all tensors but the dense ones of these names."""
        rest = (row for name, row in self._dense_entries.items() if name not in names)
        return list(chain.from_iterable(rest))

    def weight_bytes(self, choices: Choices) -> int:
        """Return the stored bytes of the compressible weights; a unit without a choice is dense."""
        return sum(
            self.count_unit_bytes(unit.name, _get_choice(choices, unit)) for unit in self.units
        )

    def file_bytes(self, choices: Choices) -> int:
        """Return the bytes of the safetensors file, or of all its shards if it exceeds
        `shard_bytes`; or of the GGUF file.

        A unit without a choice is dense, so `file_bytes({})` is the uncompressed checkpoint. The
        JSON index beside shards is not counted: it holds no weights.

        Raises:
            PlanError: as `unit_tensors`.
        """
        self._refuse_unknown(choices)
        if self.gguf is not None:
            return self.other_bytes + self.weight_bytes(choices)
        entries = dict(self._dense_entries)
        for unit in self.units:
            candidate = _get_choice(choices, unit)
            if not candidate.dense:
                packed = self._list_entries(unit.name, candidate)
                for layer, own in zip(unit.layers, packed, strict=True):
                    entries[layer.weight_name] = own
        return sum_bytes(chain.from_iterable(entries.values()), self.shard_bytes)

    def count_uniform_bytes(self, candidate: Candidate) -> int:
        """Return `file_bytes` with one candidate for every unit that supports its group size.

        Embeddings and heads that the runtime takes in fewer than 16 bits, but not so narrow, get
        the nearest width above: 8-bit floats where it packs none.
        """
        choices: dict[str, Candidate] = {}
        for unit in self.units:
            own = candidate if unit.block is not None else self._widen(unit, candidate)
            usual = own if unit.block is None or own.dense else replace(own, bits=self._usual_bits)
            if not self.explain_refusal(unit.name, usual):
                choices[unit.name] = own
        if self.gguf is not None:
            return self._sum_ideal_blocks(choices)
        return self.file_bytes(choices)

    def _sum_ideal_blocks(self, choices: Choices) -> int:
        """Return the bytes of a GGUF file in which every width has a block type, which ggml has for
        4, 5 and 8 bits alone, and for 3 and 6 where 256 divides the inputs: targets such as `7bit`,
        or `6bit` of other models, then lie between those, and `2bit` below."""
        total = self.other_bytes
        for unit in self.units:
            candidate = self.runtime.choose_grid(_get_choice(choices, unit))
            if candidate.dense or not self.explain_refusal(unit.name, candidate):
                total += self.count_unit_bytes(unit.name, candidate)
                continue
            block = count_block_bytes(candidate.bits)
            total += sum(align(layer.numel // BLOCK * block) for layer in unit.layers)
        return total

    def _widen(self, unit: Unit, candidate: Candidate) -> Candidate:
        """Return the candidate at the nearest width in which the runtime takes the vocabulary."""
        wider = [bits for bits in self.runtime.list_vocabulary_bits() if bits >= candidate.bits]
        if candidate.dense or not wider:
            return Candidate(bits=16)
        if not self.runtime.vocabulary:
            return Candidate(bits=min(wider), float8=self.runtime.list_scale_kinds()[0])
        made = [self.runtime.choose_grid(replace(candidate, bits=b)) for b in sorted(wider)]
        # a width with k scales is not for every matrix; where none is, the caller refuses the first
        taken = (c for c in made if not self.explain_refusal(unit.name, c))
        return next(taken, made[0])

    @property
    def _usual_bits(self) -> int:
        """A width that the runtime supports, for questions about the rest of a candidate."""
        return 4 if 4 in self.runtime.bits else self.runtime.bits[0]

    @cached_property
    def other_bytes(self) -> int:
        """Bytes of a GGUF file beside the weights of the units."""
        assert self.gguf is not None
        own = {layer.weight_name for unit in self.units for layer in unit.layers}
        rest = (nbytes for name, nbytes in self.gguf.dense.items() if name not in own)
        return self.gguf.frame + sum(rest)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of the uncompressed file in the checkpoint's own dtypes."""
        return self.file_bytes({})

    @cached_property
    def dense_file_bytes(self) -> int:
        """Bytes of the uncompressed file at 16 bits per weight, whatever its dtype.

        In files of the usual size, so that a share of it is the same however files are split.
        """
        at_16_bits = [replace(spec, dtype=choose_16bit_dtype(spec.dtype)) for spec in self.tensors]
        return sum_bytes(map(measure, at_16_bits))

    @cached_property
    def compressible(self) -> int:
        """Number of weights in the units."""
        return sum(unit.numel for unit in self.units)

    @cached_property
    def parameters(self) -> int:
        """Number of all stored elements."""
        return sum(spec.numel for spec in self.tensors)

    def make_size_report(self, choices: Choices) -> SizeReport:
        """Return the bytes of a choice and three averages of bits.

        `nominal_bits`: bits of a code, averaged over the compressible weights; a dense one counts
        with its storage type. `effective_bits`: all bytes of the compressible weights (codes,
        scales, shapes, those kept dense) over their number. `file_bits`: the whole file over all
        elements. Without a compressible weight the first two are 0.
        """
        file_bytes, count = self.file_bytes(choices), max(1, self.compressible)
        compressible_bytes = self.weight_bytes(choices)
        nominal = sum(
            layer.numel * _count_code_bits(layer, _get_choice(choices, unit))
            for unit in self.units
            for layer in unit.layers
        )
        return SizeReport(
            file_bytes=file_bytes,
            compressible_bytes=compressible_bytes,
            dense_file_bytes=self.dense_file_bytes,
            nominal_bits=nominal / count,
            effective_bits=8 * compressible_bytes / count,
            file_bits=8 * file_bytes / max(1, self.parameters),
            file="weight file" if self.gguf is None else "GGUF file",
        )

    def _refuse_unknown(self, choices: Choices) -> None:
        for name, candidate in choices.items():
            if name not in self._unit:
                self.list_unit_tensors(name, candidate)


def explain_layer_refusal(
    layer: LayerSpec, candidate: Candidate, layout: Layout, runtime: Runtime
) -> str | None:
    """Return why format or runtime refuse a candidate, not dense, for a layer; None if neither."""
    group = resolve_group(layer.shape[1], candidate.group_size)
    why = layout.explain_refusal(layer, candidate)
    return why or runtime.explain_refusal(layer, candidate, group)


def list_layer_tensors(
    layer: LayerSpec, candidate: Candidate, layout: Layout = PACK_QUANTIZED
) -> tuple[TensorSpec, ...]:
    """Return the tensors of one layer's weight under a candidate.

    Raises:
        PlanError: the format cannot hold the candidate.
    """
    if candidate.dense:
        shape = layer.shape[::-1] if layer.transposed else layer.shape
        return (TensorSpec(name=layer.weight_name, dtype=layer.dtype, shape=shape),)
    why = layout.explain_refusal(layer, candidate)
    if why is not None:
        raise PlanError(
            f"{candidate.label} for {layer.name} cannot be stored in {layout.name} ({why})",
            allowed="symmetric codes of 2 to 8 bits without sparsity, or 16"
            if layout is PACK_QUANTIZED
            else "another format, or w16",
        )
    return layout.tensors(layer, candidate)


def _get_choice(choices: Choices, unit: Unit) -> Candidate:
    return choices.get(unit.name, Candidate(bits=16))


def _count_code_bits(layer: LayerSpec, candidate: Candidate) -> int:
    return 8 * DTYPE_BYTES[layer.dtype] if candidate.dense else candidate.bits
