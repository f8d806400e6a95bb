"""Which candidates get narrow scales: those that then lose less for their bytes.

A scale of 8 bits (or 6 and a factor per row) among half as many inputs takes about the bytes of one
of 16 bits. Whether it serves better depends on the model: 8-bit floats lose precision where scales
are small, a factor per row is dear where rows are short, and half the group may not divide the
inputs of some layers. So both are tried on some rows of every shape of layer, rounded to nearest,
and each width takes, for the whole model, the kind with the least

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
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.sensitivity.slope_metric import estimate_rounding_error, sample_rows
from cptq.types import Candidate, LayerSpec

#: layers of one shape that are tried, spread over depth
TRIED = 2


def choose_scales(
    model: LoadedModel, candidates: Sequence[Candidate], runtime: Runtime
) -> tuple[Candidate, ...]:
    """Return the candidates, each with the scales that lose least of those that the runtime takes.

    Candidates without groups, on asymmetric grids, sparse or dense stay as they are; so do all of a
    mixture of experts, whose scales stock transformers multiplies with in their own type.
    """
    kinds = runtime.list_scale_kinds()
    if not kinds or any(spec.expert for spec in model.layers):
        return tuple(candidates)
    samples = list(_sample_layers(model))
    found = []
    for candidate in candidates:
        plain = candidate.symmetric and not candidate.dense and not candidate.sparsity
        rivals = [candidate]
        if plain and candidate.group_size > 1:
            half = candidate.group_size // 2
            rivals += [replace(candidate, group_size=half, scales=kind) for kind in kinds]
        found.append(min(rivals, key=lambda c: _weigh(samples, c)))
    return tuple(found)


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
