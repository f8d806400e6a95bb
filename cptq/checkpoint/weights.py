"""Read and replace a weight as (out, in), whatever the module's own layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint.resident import find_weight
from cptq.layouts.gguf import SUPER_MOST
from cptq.numerics.scale_grids import Float8Scales, RowScales, ScaleType
from cptq.numerics.super_scales import SuperScales
from cptq.types import SUPER_SCALES, Candidate, LayerSpec

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def get_storage_dtype(spec: LayerSpec) -> torch.dtype:
    """Return the torch type in which the checkpoint stores a layer's weight."""
    return TORCH_DTYPES[spec.dtype]


def get_scale_dtype(spec: LayerSpec) -> torch.dtype:
    """Return the torch type in which the scales of a layer are stored."""
    return TORCH_DTYPES[spec.scale_dtype]


def get_scale_type(spec: LayerSpec, candidate: Candidate) -> ScaleType:
    """Return how the scales of a layer are stored under a candidate."""
    if not candidate.scales:
        return get_scale_dtype(spec)
    if candidate.scales == SUPER_SCALES:
        return SuperScales(SUPER_MOST[candidate.bits], get_scale_dtype(spec))
    return (
        RowScales(get_scale_dtype(spec))
        if candidate.scales == "row"
        else Float8Scales(candidate.scales)
    )


def get_scale_dtypes(spec: LayerSpec, candidate: Candidate) -> tuple[torch.dtype, ...]:
    """Return the types that scales may have in memory.

    16-bit ones the type of the file; earlier versions kept the checkpoint's. Narrower ones float32.
    """
    if candidate.narrow_scales:
        return (torch.float32,)
    return get_scale_dtype(spec), get_storage_dtype(spec)


def get_dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a type."""
    return next(name for name, known in TORCH_DTYPES.items() if known is dtype)


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight (out, in) on the model's device; a Conv1D stores the transpose.

    A weight that is not in memory comes in the type of the checkpoint, which may be narrower than
    that of the model. Do not write to it, it may be a view: use `set_weight`.
    """
    known = find_weight(module)
    weight = module.weight if known is None else known.read()
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def get_stored_weight(module: nn.Module) -> Tensor:
    """Return the weight of the checkpoint as `get_weight` does, whatever was set since."""
    known = find_weight(module)
    if known is None:
        return get_weight(module)
    stored = known.read_stored()
    return stored.T if isinstance(module, Conv1D) else stored


def set_weight(module: nn.Module, W_OI: Tensor) -> None:
    """Let the module compute with an (out, in) tensor, which is kept and must not change."""
    known = find_weight(module)
    if known is None:
        get_weight(module).copy_(W_OI)
        return
    known.write(W_OI.T.contiguous() if isinstance(module, Conv1D) else W_OI)


def make_weight(module: nn.Module, make: Callable[[], Tensor]) -> None:
    """Let the module compute with an (out, in) tensor that is made whenever it is needed."""
    known = find_weight(module)
    if known is None:
        set_weight(module, make())
    else:
        transposed = isinstance(module, Conv1D)
        known.write((lambda: make().T.contiguous()) if transposed else make)


@contextmanager
def replace_weight(module: nn.Module, W_OI: Tensor | Callable[[], Tensor]) -> Iterator[None]:
    """Replace the weight inside the context and restore it afterwards.

    `W_OI` may be what makes the tensor whenever it is needed.
    """
    known = find_weight(module)
    before = get_weight(module).clone() if known is None else known.source
    if isinstance(W_OI, Tensor):
        set_weight(module, W_OI)
    else:
        make_weight(module, W_OI)
    try:
        yield
    finally:
        if known is not None:
            known.write(before)
        elif isinstance(before, Tensor):
            set_weight(module, before)
