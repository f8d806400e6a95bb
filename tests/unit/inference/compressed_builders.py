"""Small compressed-tensors checkpoints of every kind that can stay packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.numerics.float8 import round_to_float8
from cptq.types import Candidate, CompressedLayer, LayerResult, LayerSpec
from tests.unit.artifact.builders import load, write
from tests.unit.artifact.packed_builders import pack, pack_layer

LINEARS = tuple(
    Candidate(bits=bits, group_size=group, scales=scales)
    for bits, group, scales in (
        (2, 16, "e4m3"),
        (3, 16, ""),
        (4, 0, ""),
        (5, 48, "e5m2"),
        (6, 16, ""),
        (7, 24, "e4m3"),
        (8, 0, ""),
    )
)


def write_compressed(
    path: Path, out: Path, *, linears: Sequence[Candidate] = LINEARS, vocabulary: str = "e4m3"
) -> LoadedModel:
    """Compress a checkpoint by rounding: linears in turn, embeddings and heads as 8-bit floats.

    With `vocabulary` "" these stay dense. Returns the dense model in memory, changed likewise.
    """
    model, turn = load(path, experts=True), cycle(linears)
    plan = pack(load(path), ("w8c",))[1]
    layers = [
        layer
        for spec in model.layers
        if spec.tied_to is None and (layer := _compress(model, spec, turn, vocabulary)) is not None
    ]
    choices = {layer.spec.name: layer.result.candidate for layer in layers}
    write(model, layers, replace(plan, choices=choices), out)
    return model


def _compress(
    model: LoadedModel, spec: LayerSpec, turn: cycle[Candidate], vocabulary: str
) -> CompressedLayer | None:
    if spec.kind in ("embedding", "head"):
        return _round_to_float8(model, spec, vocabulary) if vocabulary else None
    choice = next(turn)
    if PACK_QUANTIZED.explain_refusal(spec, choice) is not None:
        return None
    return pack_layer(model, spec, choice)


def _round_to_float8(model: LoadedModel, spec: LayerSpec, kind: str) -> CompressedLayer:
    module = model.linear(spec.name)
    codes_OI = round_to_float8(get_weight(module).float(), kind)
    result = LayerResult(
        name=spec.name,
        candidate=Candidate(bits=8, float8=kind),
        group_size=0,
        nbytes=0,
        weight_error=0.01,
        output_error=None,
        seconds=0.5,
    )
    set_weight(module, codes_OI.to(model.dtype))
    ones_OG = torch.ones(spec.shape[0], 1)
    return CompressedLayer(spec=spec, result=result, codes=codes_OI, scale=ones_OG)
