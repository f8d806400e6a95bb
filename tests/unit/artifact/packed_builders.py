"""Small models compressed in every way that the packed format holds, by rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_scale_type, get_weight, set_weight
from cptq.layouts.groups import resolve_group
from cptq.layouts.packed import PACKED_LAYOUT, TWO_OF_FOUR
from cptq.numerics.grid import dequantize_layer, quantize_nearest
from cptq.numerics.masks import build_magnitude_mask
from cptq.types import (
    Artifact,
    Budget,
    Candidate,
    CompressedLayer,
    LayerResult,
    LayerSpec,
    Plan,
)
from tests.unit.artifact.builders import load, sample_of, write

SYMMETRIC = ("w2g16", "w3c", "w4g32", "w5g16", "w6c", "w7g24", "w8c")
ASYMMETRIC = tuple(f"{label}-asym" for label in SYMMETRIC)
SPARSE = ("w4g16-s50", "w8c-s75", "w3c-asym-s60", "w2g16-s30")
TWO_FOUR = ("w4g16-2:4", "w8c-2:4", "w3c-asym-2:4")
ROW = ("w4g16-row", "w3g8-row", "w6g24-row")
UNEVEN = ("w2g16-nl", "w3g8-nl-row", "w4g16-nl-row", "w5c-nl", "w6g24-nl", "w4g32-iq4nl")
EVERYTHING = SYMMETRIC + ASYMMETRIC + SPARSE + TWO_FOUR + ROW + UNEVEN


def mask_of(W_OI: torch.Tensor, choice: Candidate) -> torch.Tensor | None:
    """The mask of a sparse candidate: the largest weights."""
    if choice.pattern == TWO_OF_FOUR:
        blocks = W_OI.abs().view(-1, 4)
        mask = torch.zeros_like(blocks, dtype=torch.bool)
        return mask.scatter_(1, blocks.topk(2).indices, True).view(W_OI.shape)
    return build_magnitude_mask(W_OI, choice.sparsity) if choice.sparsity else None


def pack_layer(model: LoadedModel, spec: LayerSpec, choice: Candidate) -> CompressedLayer:
    """Compress a layer by rounding and put the result into the model."""
    module = model.linear(spec.name)
    W_OI = get_weight(module).float().contiguous()
    mask = mask_of(W_OI, choice)
    kept_OI, group = (
        W_OI if mask is None else W_OI * mask,
        resolve_group(spec.shape[1], choice.group_size),
    )
    codes, scale, zero = quantize_nearest(
        kept_OI,
        choice.bits,
        group,
        symmetric=choice.symmetric,
        scale_dtype=get_scale_type(spec, choice),
        levels=choice.levels,
    )
    result = LayerResult(
        name=spec.name,
        candidate=choice,
        group_size=0 if group == spec.shape[1] else group,
        nbytes=0,
        weight_error=0.01,
        output_error=None,
        seconds=0.5,
    )
    layer = CompressedLayer(
        spec=spec, result=result, codes=codes, scale=scale, zero=zero, mask=mask
    )
    set_weight(module, dequantize_layer(layer, model.dtype))
    return layer


def packable(model: LoadedModel) -> list[LayerSpec]:
    """All layers that a packed module can stand for: also embeddings, heads and Conv1D."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    return [
        spec
        for spec in model.layers
        if spec.tied_to is None
        and (spec.kind != "embedding" or model.linear(spec.name) is embedding)
    ]


def pack(
    model: LoadedModel, labels: Sequence[str] = EVERYTHING
) -> tuple[list[CompressedLayer], Plan]:
    """Layer after layer gets the next label that it can have; the module is changed in place."""
    turn, layers = cycle(labels), []
    for spec in packable(model):
        choices = (Candidate.parse(next(turn)) for _ in labels)
        choice = next((c for c in choices if PACKED_LAYOUT.explain_refusal(spec, c) is None), None)
        if choice is not None:
            layers.append(pack_layer(model, spec, choice))
    plan = Plan(
        model_fingerprint=model.fingerprint,
        budget=Budget(limit_bytes=1 << 30, asked="16bit"),
        allocator="by hand",
        metric=None,
        table_digest=None,
        choices={layer.spec.name: layer.result.candidate for layer in layers},
        predicted_bytes=0,
        predicted_loss=None,
    )
    return layers, plan


def write_packed(
    path: Path, out: Path, labels: Sequence[str] = EVERYTHING, *, verify: bool = False
) -> tuple[LoadedModel, list[CompressedLayer], Artifact]:
    """Pack the checkpoint at `path`; the model in memory, its layers and what was written."""
    model = load(path)
    layers, plan = pack(model, labels)
    sample = sample_of(model) if verify else None
    return model, layers, write(model, layers, plan, out, sample=sample, form="packed")
