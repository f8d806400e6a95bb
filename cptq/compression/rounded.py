"""A model whose units are rounded to nearest in place: what a plan gives without any text.

Weights are rounded when they are needed, so that a model of which one block is in memory at a time
never holds them all; `model.restore_dense()` undoes it.

Cost: one rounding of a layer whenever its weights are loaded. Limits: the mask of a sparse
candidate is chosen as if inputs were independent and equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_stored_weight, make_weight
from cptq.compression import COMPRESSORS
from cptq.compression.layer import compress_layer
from cptq.layouts import Layout
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, LayerSpec, Unit

NEAREST = "nearest"


def round_units(
    model: LoadedModel,
    units: Iterable[Unit],
    choices: Mapping[str, Candidate],
    *,
    layout: Layout,
    float16_scales: bool,
) -> None:
    """Let a model compute with units rounded to nearest.

    Args:
        model: with the weights of the checkpoint beside those that were set.
        units: of it; those that `choices` keeps dense, or does not name, are left as they are.
        choices: {unit: candidate}.
        layout: how layers are stored.
        float16_scales: as `compress_layer` takes it.
    """
    for unit in units:
        candidate = choices.get(unit.name)
        if candidate is None or candidate.dense:
            continue
        for spec in unit.layers:
            rounded = partial(_round, model, spec, candidate, layout, float16_scales)
            make_weight(model.linear(spec.name), rounded)


def _round(
    model: LoadedModel, spec: LayerSpec, candidate: Candidate, layout: Layout, float16_scales: bool
) -> Tensor:
    """Return the weight W_OI of a layer, rounded to the nearest codes."""
    layer = compress_layer(
        spec,
        get_stored_weight(model.linear(spec.name)).float(),
        None,
        candidate,
        COMPRESSORS.get(NEAREST),
        layout,
        float16_scales=float16_scales,
        measure_output=False,
    )
    return dequantize_layer(layer, model.dtype)
