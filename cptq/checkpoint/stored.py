"""Which files hold the weights of a checkpoint, and what their tensors are beside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cptq.checkpoint.files import (
    PICKLE_INDEX,
    PICKLE_SINGLE,
    find_pickle_files,
    find_weight_files,
    read_tensor_specs,
)
from cptq.checkpoint.inventory import find_ties
from cptq.checkpoint.load_errors import explain_load_errors
from cptq.checkpoint.weights import get_dtype_name
from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.inference.modules import find_packed_modules
from cptq.types import TensorSpec


def find_main_dtype(stored: Mapping[str, TensorSpec]) -> str:
    """Return the floating type that holds most of the bytes."""
    bytes_by: dict[str, int] = {}
    for spec in stored.values():
        if spec.dtype in ("F16", "BF16", "F32", "F64"):
            bytes_by[spec.dtype] = bytes_by.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_by, key=lambda dtype: bytes_by[dtype], default="F32")


def list_stored_tensors(
    module: nn.Module, stored: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the model's tensors as a dense artifact holds them: once each, in storage types."""
    ties, usual = find_ties(module), find_main_dtype(stored)
    specs = []
    for name, tensor in module.state_dict().items():
        if name in ties:
            continue
        known = stored.get(name)
        floating = tensor.is_floating_point()
        dtype = known.dtype if known else (usual if floating else get_dtype_name(tensor.dtype))
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape)))
    return tuple(specs)


def list_unpacked_tensors(
    module: nn.Module, stored: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the tensors of an artifact, each packed weight in its dense shape."""
    state, packed, specs = module.state_dict(), find_packed_modules(module), []
    for name, spec in stored.items():
        layer, _, part = name.rpartition(".")
        shape = state.get(f"{layer}.weight_shape")
        dense = packed[layer].shape if layer in packed else None
        if part == "weight_packed" and shape is not None:
            dense, shape = tuple(shape.tolist()), None
        if part in ("weight", "weight_packed") and dense is not None:
            dtype = stored[f"{layer}.weight_scale"].dtype
            specs.append(TensorSpec(name=f"{layer}.weight", dtype=dtype, shape=dense))
        elif (dense is None and shape is None) or not part.startswith("weight_"):
            specs.append(spec)
    return tuple(specs)


def find_weights(path: Path, settings: ModelSettings) -> list[Path]:
    files = find_weight_files(path) or (find_pickle_files(path) if settings.allow_pickle else [])
    if files:
        return files
    pickles = [name for name in (PICKLE_SINGLE, PICKLE_INDEX) if (path / name).exists()]
    if pickles:
        raise ModelError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when opened",
            allowed="safetensors",
            hint="pass --allow-pickle if you trust its author",
        )
    raise ModelError(f"{path} has no model.safetensors and no index of shards")


def read_stored_tensors(
    path: Path, files: list[Path], settings: ModelSettings
) -> dict[str, TensorSpec]:
    """Return the tensors as the checkpoint stores them; of pickles all but the data is read."""
    if find_weight_files(path):
        return read_tensor_specs(path)
    specs = {}
    with explain_load_errors(settings.model):
        for file in files:
            loaded = torch.load(file, map_location="meta", weights_only=True)
            for name, value in loaded.items():
                if isinstance(value, torch.Tensor):
                    dtype, shape = get_dtype_name(value.dtype), tuple(value.shape)
                    specs[name] = TensorSpec(name=name, dtype=dtype, shape=shape)
    return specs
