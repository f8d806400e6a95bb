"""`dense`: the compressed weights dequantized to 16 bits, an ordinary checkpoint for any tool.

It saves no bytes compared with a 16-bit checkpoint. It serves programs that read no packed format,
and comparisons, because it holds the values of the compressed weights. Weights keep the
checkpoint's 16-bit type; float32 becomes float16 (bfloat16 if a value would overflow). codes *
scale is rounded to that type by at most half a unit in the last place (2^-12 of a weight in
float16, 2^-9 in bfloat16), so outputs differ slightly from those of the packed artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cptq.artifact.companions import copy_companions, write_config
from cptq.artifact.content import Content
from cptq.artifact.formats.compressed_tensors import format_loading_code
from cptq.artifact.formats.interface import CheckpointFormat
from cptq.artifact.reload import ReloadCheck, ReloadSample
from cptq.artifact.weights import write_weights
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.layouts.dense import DENSE_16BIT
from cptq.layouts.safetensors_header import measure, sum_bytes
from cptq.numerics.grid import dequantize_layer
from cptq.types import Emit, ModelKind, TensorSpec, choose_16bit_dtype

#: allowed difference of outputs due to 16-bit weights, as a share of the largest
TOLERANCE = 0.05
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Dense(CheckpointFormat):
    """The format described at the top of this module."""

    name = "dense"
    layout = DENSE_16BIT
    multiplied_out = True

    def check(self, content: Content) -> None:
        """Accept everything: every layer can be dequantized."""

    def estimate_bytes(self, content: Content) -> int:
        return sum_bytes(map(measure, _list_tensors(content)), content.shard_bytes)

    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        specs = _list_tensors(content)
        stored = {spec.name: spec for spec in content.tensors}
        files = write_weights(
            place,
            specs,
            lambda spec: _convert_tensor(content, stored[spec.name], spec.dtype),
            most=content.shard_bytes,
        )
        kinds = {spec.dtype for spec in specs} & set(_NAMES)
        main = max(kinds, key=lambda k: sum(s.nbytes for s in specs if s.dtype == k), default="F16")
        write_config(content.path, None, place, dtype=_NAMES[main])
        copy_companions(content, place, emit)
        return files

    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        loose = replace(sample, tolerance=max(TOLERANCE, sample.tolerance))
        return super().check_reload(place, kind, loose, emit, source)

    def describe_loading(self, content: Content) -> Sequence[str]:
        return format_loading_code(content)


def _list_tensors(content: Content) -> list[TensorSpec]:
    """List all tensors at 16 bits; float32 becomes bfloat16 where float16 would overflow."""
    narrow = []
    for spec in content.tensors:
        dtype = choose_16bit_dtype(spec.dtype)
        if dtype != spec.dtype and not _fit_float16(_get_float32(content, spec)):
            dtype = "BF16"
        narrow.append(replace(spec, dtype=dtype))
    return narrow


def _fit_float16(value: Tensor) -> bool:
    return bool(value.abs().max() <= torch.finfo(torch.float16).max) if value.numel() else True


def _get_float32(content: Content, spec: TensorSpec) -> Tensor:
    """Return a tensor of the file in float32, compressed layers dequantized."""
    layer = content.compressed.get(spec.name)
    if layer is None:
        return content.get_dense(spec)
    W_OI = dequantize_layer(layer, torch.float32)
    return W_OI.T if layer.spec.transposed else W_OI


def _convert_tensor(content: Content, stored: TensorSpec, dtype: str) -> Tensor:
    return _get_float32(content, stored).to(TORCH_DTYPES[dtype])


DENSE = Dense()
