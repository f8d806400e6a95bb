"""Token embeddings, and output heads of their own, rounded to nearest at one width.

They are no units of a plan: nothing flows into an embedding that could calibrate it, and a head is
where an error costs most, so both get the same high width, named by the user. A head that shares
its weight with the embedding shares the codes as well. Positions and token types stay dense: they
are small, and a family adds to them or looks them up in its own way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_storage_dtype, get_weight, set_weight
from cptq.compression import nearest
from cptq.compression.half import in_half
from cptq.compression.problem import Compressor, Problem
from cptq.config import Runtime
from cptq.layouts import Layout
from cptq.layouts.groups import resolve_group
from cptq.numerics.masks import compute_relative_error
from cptq.types import Candidate, CompressedLayer, Emit, LayerResult, LayerSpec, Notice, TensorSpec


def embedding_tensors(
    model: LoadedModel, candidate: Candidate | None, layout: Layout, runtime: Runtime, emit: Emit
) -> dict[str, tuple[TensorSpec, ...]]:
    """What the weights become, by the name of the dense tensor; what cannot be packed is said."""
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
    """Round them; afterwards the module computes with the compressed weights."""
    if candidate is None:
        return []
    method = in_half(nearest.compress) if runtime.half_scales else nearest.compress
    found = _layers(model, candidate, layout, runtime)
    packed = [spec for spec, why in found.items() if why is None]
    return [_compress(model, spec, candidate, method, layout) for spec in packed]


def _layers(
    model: LoadedModel, candidate: Candidate, layout: Layout, runtime: Runtime
) -> Mapping[LayerSpec, str | None]:
    """Token embedding and untied head, with the reason where one cannot be packed."""
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


def _compress(
    model: LoadedModel,
    spec: LayerSpec,
    candidate: Candidate,
    method: Compressor,
    layout: Layout,
) -> CompressedLayer:
    began, module = time.perf_counter(), model.linear(spec.name)
    W_OI, group = get_weight(module).float(), resolve_group(spec.shape[1], candidate.group_size)
    solution = method(
        Problem(
            W_OI=W_OI,
            H_II=W_OI.new_zeros(0, 0),  # nothing is known of the inputs, and nothing asked
            bits=candidate.bits,
            group=group,
            scale_dtype=get_storage_dtype(spec),
            symmetric=candidate.symmetric,
        )
    )
    result = LayerResult(
        name=spec.name,
        candidate=candidate,
        group_size=0 if group == spec.shape[1] else group,
        nbytes=sum(tensor.nbytes for tensor in layout.tensors(spec, candidate)),
        weight_error=0.0,
        output_error=None,
        seconds=time.perf_counter() - began,
    )
    codes_OI, scale_OG, zero_OG = solution.codes_OI, solution.scale_OG, solution.zero_OG
    layer = CompressedLayer(spec=spec, result=result, codes=codes_OI, scale=scale_OG, zero=zero_OG)
    Q_OI = layer.dense(torch.float32)
    error = compute_relative_error([W_OI - Q_OI], [W_OI])
    set_weight(module, Q_OI)
    return replace(layer, result=replace(result, weight_error=error))
