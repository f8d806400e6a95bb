"""Token embeddings, and output heads of their own, rounded to nearest at one width.

They are not units of a plan: an embedding has no input activations that could calibrate it, and an
error costs most in a head, so both get the same high width, named by the user. A head that shares
its weight with the embedding shares the codes as well. Positions and token types stay dense: they
are small, and a family adds to them or looks them up in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cptq.checkpoint.model import LoadedModel
from cptq.compression import nearest
from cptq.compression.layer import compress_module
from cptq.config import Runtime
from cptq.layouts import Layout
from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, CompressedLayer, Emit, LayerSpec, Notice, TensorSpec


def embedding_tensors(
    model: LoadedModel, candidate: Candidate | None, layout: Layout, runtime: Runtime, emit: Emit
) -> dict[str, tuple[TensorSpec, ...]]:
    """Return what the weights become, by the name of the dense tensor; report what stays dense."""
    if candidate is None:
        return {}
    found = _layers(model, candidate, layout, runtime)
    for spec, why in found.items():
        if why is not None:
            emit(Notice(kind="skipped", subject=spec.name, message=f"kept dense: {why}"))
    packed = [spec for spec, why in found.items() if why is None]
    return {spec.weight_name: layout.tensors(spec, candidate) for spec in packed}


def compress_embeddings(
    model: LoadedModel, candidate: Candidate | None, layout: Layout, runtime: Runtime
) -> list[CompressedLayer]:
    """Round them in place: the model then computes with the compressed weights."""
    if candidate is None:
        return []
    found = _layers(model, candidate, layout, runtime)
    return [
        compress_module(
            model.linear(spec.name),
            spec,
            None,
            candidate,
            nearest.compress,
            layout,
            dtype=torch.float32,
            float16_scales=runtime.float16_scales,
        )
        for spec, why in found.items()
        if why is None
    ]


def _layers(
    model: LoadedModel, candidate: Candidate, layout: Layout, runtime: Runtime
) -> Mapping[LayerSpec, str | None]:
    """Return the token embedding and an untied head, with the reason where one stays dense."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    found: dict[LayerSpec, str | None] = {}
    for spec in model.layers:
        module = model.linear(spec.name)
        if spec.tied_to is None and (spec.kind == "head" or module is embedding):
            plain = type(module) in (nn.Embedding, nn.Linear)
            why = None if plain else f"a {type(module).__name__}, which does more than look up"
            group = resolve_group(spec.shape[1], candidate.group_size)
            why = why or layout.refusal(spec, candidate)
            found[spec] = why or runtime.refusal(spec, candidate, group)
    return found
