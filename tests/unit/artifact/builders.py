"""Small compressed models, made by rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import torch

from cptq.allocation.cost import CostModel
from cptq.artifact.content import Content, build_content
from cptq.artifact.draft import Record, draft
from cptq.artifact.formats import DEFAULT_FORMAT
from cptq.artifact.formats.gguf import GGUF
from cptq.artifact.reload import ReloadSample
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_scale_type, get_weight, set_weight
from cptq.config import ModelSettings
from cptq.layouts.groups import resolve_group
from cptq.numerics.grid import MOST_BITS, dequantize_layer, quantize_nearest
from cptq.numerics.scale_grids import ScaleType
from cptq.types import (
    Artifact,
    Budget,
    CalibrationRecord,
    Candidate,
    CompressedLayer,
    Event,
    LayerResult,
    LayerSpec,
    Plan,
)

RECORD = CalibrationRecord(
    source="pydoc",
    origin="python",
    samples=2,
    seqlen=16,
    tokens=32,
    seed=0,
    fingerprint="a" * 64,
    text_sha256="b" * 64,
)
MIXED = (2, 3, 4, 5, 6, 7, 8, 16)


def load(path: Path, *, conv1d: bool = False, experts: bool = False) -> LoadedModel:
    settings = ModelSettings(model=str(path), device="cpu")
    return load_model(settings, lambda event: None, conv1d=conv1d, experts=experts)


def compress(
    model: LoadedModel, bits: Sequence[int] = MIXED, groups: Sequence[int] = (32,)
) -> tuple[list[CompressedLayer], Plan]:
    """Unit after unit gets the next of `bits` and of `groups`; the module is changed in place."""
    width, size = cycle(bits), cycle(groups)
    choices = {u.name: candidate(next(width), next(size)) for u in model.units}
    layers = [
        compress_layer(model, spec, choices[u.name])
        for u in model.units
        for spec in u.layers
        if not choices[u.name].dense
    ]
    cost = CostModel(model.units, model.tensors)
    plan = Plan(
        model_fingerprint=model.fingerprint,
        budget=Budget(limit_bytes=cost.dense_bytes, asked="16bit"),
        allocator="by hand",
        metric=None,
        table_digest=None,
        choices=choices,
        predicted_bytes=cost.file_bytes(choices),
        predicted_loss=None,
    )
    return layers, plan


def candidate(bits: int, group: int) -> Candidate:
    return Candidate(bits=bits, group_size=0 if bits == 16 else group)


def quantized(
    W_OI: torch.Tensor, choice: Candidate, group: int, dtype: ScaleType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales, zero points; on asymmetric grids as llama.cpp wants them, where it can."""
    return quantize_nearest(
        W_OI,
        choice.bits,
        group,
        symmetric=choice.symmetric,
        scale_dtype=dtype,
        float16_offset=choice.bits <= MOST_BITS,
    )


def compress_layer(model: LoadedModel, spec: LayerSpec, choice: Candidate) -> CompressedLayer:
    inputs = spec.shape[1]
    group = resolve_group(inputs, choice.group_size)
    module = model.linear(spec.name)
    W_OI = get_weight(module).float().contiguous()
    codes, scale, zero = quantized(W_OI, choice, group, get_scale_type(spec, choice))
    result = LayerResult(
        name=spec.name,
        candidate=choice,
        group_size=0 if group == inputs else group,
        nbytes=0,
        weight_error=0.01,
        output_error=None,
        seconds=0.5,
    )
    layer = CompressedLayer(spec=spec, result=result, codes=codes, scale=scale, zero=zero)
    set_weight(module, dequantize_layer(layer, model.dtype))
    return layer


def inputs_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).view(2, 12) % model.config.vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def sample_of(model: LoadedModel) -> ReloadSample:
    inputs = inputs_of(model)
    output = model.module(**inputs)
    logits = getattr(output, "logits", None)
    return ReloadSample(
        inputs=inputs, expected=output.last_hidden_state if logits is None else logits
    )


def write(
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    sample: ReloadSample | None = None,
    extras: dict[str, bytes] | None = None,
    form: str = DEFAULT_FORMAT,
    events: list[Event] | None = None,
) -> Artifact:
    emit = (events if events is not None else []).append
    content = build_content(model, layers, emit)
    with draft(out, overwrite=overwrite, source=model.path, form=form, emit=emit) as d:
        d.write(content, Record(plan=plan, calibration=RECORD, seed=0), extras)
        d.verify(sample)
    return d.artifact


def write_gguf(content: Content, place: Path, events: list[Event] | None = None) -> gguf.GGUFReader:
    """Write a GGUF file into a new directory and open it with the gguf package."""
    GGUF.check(content)
    place.mkdir()
    (name,) = GGUF.write(content, place, (events if events is not None else []).append)
    return gguf.GGUFReader(place / name)


def read_gguf_weight(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    """Dequantize a tensor with the gguf package."""
    tensor = next(t for t in reader.tensors if t.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
