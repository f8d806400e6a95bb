"""Read and replace a weight as (out, in), whatever the module's own layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.numerics.scale_grids import Float8Scales, RowScales, ScaleType
from cptq.types import Candidate, LayerSpec

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
    return (
        RowScales(get_scale_dtype(spec))
        if candidate.scales == "row"
        else Float8Scales(candidate.scales)
    )


def get_scale_dtypes(spec: LayerSpec, candidate: Candidate) -> tuple[torch.dtype, ...]:
    """Return the types that scales may have in memory.

    16-bit ones the type of the file; earlier versions kept the checkpoint's. Narrower ones float32.
    """
    if candidate.scales:
        return (torch.float32,)
    return get_scale_dtype(spec), get_storage_dtype(spec)


def get_dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a type."""
    return next(name for name, known in TORCH_DTYPES.items() if known is dtype)


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight as an (out, in) view; a Conv1D stores the transpose."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def set_weight(module: nn.Module, W_OI: Tensor) -> None:
    """Overwrite the weight in place with an (out, in) tensor."""
    get_weight(module).copy_(W_OI)


@contextmanager
def replace_weight(module: nn.Module, W_OI: Tensor) -> Iterator[None]:
    """Replace the weight by `W_OI` inside the context and restore it afterwards."""
    before = get_weight(module).clone()
    set_weight(module, W_OI)
    try:
        yield
    finally:
        set_weight(module, before)
