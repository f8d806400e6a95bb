"""Which grid each width gets: narrow scales and uneven levels, where it then loses less.

A scale of 8 bits (or 6 and a factor per row) among half as many inputs takes about the bytes of one
of 16 bits. Whether it serves better depends on the model: 8-bit floats lose precision where scales
are small, a factor per row is dear where rows are short, and half the group may not divide the
inputs of some layers. Uneven levels (`numerics.levels`) take no bytes, and serve better where
weights are nearly normal, as most are. So all ways are tried on some rows of every shape of layer,
rounded to nearest, and each width takes, for the whole model, the one with the least

    relative squared error * 4^(stored bits per weight),

as one bit more divides the error by four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.config import Runtime
from cptq.layouts.levels import LEVELS
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.sensitivity.slope_metric import estimate_rounding_error, sample_rows
from cptq.types import Candidate, LayerSpec

#: layers of one shape that are tried, spread over depth
TRIED = 2


def choose_grids(
    model: LoadedModel,
    candidates: Sequence[Candidate],
    runtime: Runtime,
    *,
    scales: bool,
    levels: bool,
) -> tuple[Candidate, ...]:
    """Return the candidates, each with the grid that loses least of those that the runtime takes.

    Candidates on asymmetric grids, sparse or dense stay as they are, and those without groups keep
    their scales; so do all of a mixture of experts, whose scales stock transformers multiplies with
    in their own type. `scales`, `levels`: whether others than 16-bit scales and even levels are
    tried.
    """
    kinds = runtime.list_scale_kinds() if scales else ()
    tables = runtime.levels if levels else ()
    if not (kinds or tables) or any(spec.expert for spec in model.layers):
        return tuple(candidates)
    samples = list(_sample_layers(model))
    rivals = (_list_rivals(candidate, kinds, tables) for candidate in candidates)
    return tuple(min(row, key=lambda c: _weigh(samples, c)) for row in rivals)


def _list_rivals(
    candidate: Candidate, kinds: Sequence[str], tables: Sequence[str]
) -> list[Candidate]:
    """Return the ways to store a width, the usual one first."""
    rivals = [candidate]
    if candidate.dense or candidate.sparsity or candidate.float8 or not candidate.symmetric:
        return rivals
    if candidate.group_size > 1:
        half = candidate.group_size // 2
        rivals += [replace(candidate, group_size=half, scales=kind) for kind in kinds]
    known = [name for name in tables if candidate.bits in LEVELS[name]]
    return rivals + [replace(rival, levels=name) for name in known for rival in rivals]


def _sample_layers(model: LoadedModel) -> Iterator[tuple[LayerSpec, Tensor]]:
    """Yield some layers of every shape, with those rows of their weights that are tried."""
    by_shape: dict[tuple[int, int], list[LayerSpec]] = {}
    for unit in model.units:
        for spec in unit.layers:
            by_shape.setdefault(spec.shape, []).append(spec)
    for specs in by_shape.values():
        step = max(1, len(specs) // TRIED)
        for spec in specs[::step][:TRIED]:
            yield spec, sample_rows(get_weight(model.linear(spec.name))).float()


def _weigh(samples: Sequence[tuple[LayerSpec, Tensor]], candidate: Candidate) -> float:
    """Return the mean of the layers' relative squared errors at equal bits per weight."""
    # 16-bit scales take the same bytes in both layouts
    layout = PACKED_LAYOUT if candidate.scales == "row" else PACK_QUANTIZED
    errors, nbytes, weights = 0.0, 0, 0
    for spec, W_OI in samples:
        errors += estimate_rounding_error([W_OI], [spec], candidate) * spec.numel
        nbytes += sum(tensor.nbytes for tensor in layout.tensors(spec, candidate))
        weights += spec.numel
    return float(errors / weights * 4 ** (8 * nbytes / weights))
