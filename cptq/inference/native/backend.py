"""The backend `native`: packed products in C, straight from the bits of the file.

By default activations are rounded to 8 bits with one scale per 32 inputs, which is how processors
multiply fastest; `operations.set_exact` asks for float32 activations. Sums are float32 in either
case, and results are rounded once to the type of `x`. Exact products of many tokens unpack tiles
in C and multiply them with torch.

Cost of a call besides the product: some microseconds. Limits: CPU, no sparse weights, no gradients
(an `x` that needs them is given to `reference`).
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from cptq.inference import operations, reference
from cptq.inference.native.library import (
    NO_MEMORY,
    NO_SUCH_ROW,
    TYPES,
    LibraryError,
    describe_weight,
    load_library,
)
from cptq.inference.operations import Backend, PackedWeight

#: tokens from which an exact product is faster as a dense one of unpacked tiles
DENSE_TOKENS = 24


def supports(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the weight is on the CPU and not sparse, and the library is there."""
    scales = weight.scale if weight.factor is None else weight.factor
    return (
        weight.mask is None
        and weight.pattern is None
        and dtype in TYPES
        and scales.dtype in TYPES
        and weight.codes.is_cpu
        and is_available()
    )


@cache
def is_available() -> bool:
    """Whether the library can be used; if not, a warning says so once."""
    try:
        load_library()
    except LibraryError as error:
        warnings.warn(
            f"packed weights are computed slowly, with plain torch, because the C library of cptq "
            f"is missing: {error}; install a C compiler (gcc or clang) and run "
            "`pip install --force-reinstall --no-deps --no-cache-dir` with the source of cptq",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + b."""
    out, inputs = weight.shape
    *leading, width = x.shape
    if width != inputs or not x.is_cpu:
        raise RuntimeError(f"x {tuple(x.shape)} on {x.device} and a CPU weight {weight.shape}")
    if x.requires_grad and torch.is_grad_enabled():
        return reference.linear(x, weight, bias)
    exact, tokens = operations.is_exact(), prod(leading)
    if exact and tokens >= DENSE_TOKENS:
        return _multiply_tiles(x, weight, bias)
    x_TI = _convert(x, torch.float32)
    bias_O = None if bias is None else _convert(bias, torch.float32)
    y = torch.empty((*leading, out), dtype=torch.float32)
    struct, library = _find_struct(weight)
    failed = library.cptq_linear(
        struct,
        x_TI.data_ptr(),
        tokens,
        None if bias_O is None else bias_O.data_ptr(),
        y.data_ptr(),
        exact,
        torch.get_num_threads(),
    )
    if failed:
        _fail(failed)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack only the requested rows."""
    ids_N = _convert(ids, torch.int64)
    rows = torch.empty((*ids.shape, weight.shape[1]), dtype=torch.float32)
    struct, library = _find_struct(weight)
    failed = library.cptq_rows(
        struct,
        ids_N.data_ptr(),
        ids.numel(),
        rows.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        _fail(failed)
    return rows.to(dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the whole weight."""
    out, inputs = weight.shape
    W_OI = torch.empty((out, inputs), dtype=dtype)
    for start, W_RI in _iterate_tiles(weight):
        W_OI[start : start + len(W_RI)] = W_RI
    return W_OI


def _multiply_tiles(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    x_TI, parts = _convert(x, torch.float32), []
    for start, W_RI in _iterate_tiles(weight):
        bias_R = None if bias is None else bias[start : start + len(W_RI)].float()
        parts.append(functional.linear(x_TI, W_RI, bias_R))
    return torch.cat(parts, dim=-1).to(x.dtype)


def _iterate_tiles(weight: PackedWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows as float32); the memory of the rows is used again."""
    out, inputs = weight.shape
    rows = max(1, reference.TILE // inputs)
    buffer_RI = torch.empty((min(rows, out), inputs), dtype=torch.float32)
    struct, library = _find_struct(weight)
    for start in range(0, out, rows):
        ids_R = torch.arange(start, min(start + rows, out))
        failed = library.cptq_rows(
            struct,
            ids_R.data_ptr(),
            len(ids_R),
            buffer_RI.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            _fail(failed)
        yield start, buffer_RI[: len(ids_R)]


def _find_struct(weight: PackedWeight) -> tuple[Any, ctypes.CDLL]:
    """Return a pointer to the structure of a weight, which is made once, and the library."""
    found: tuple[Any, ctypes.CDLL] | None = weight.prepared.get("native")
    if found is None:
        found = ctypes.pointer(describe_weight(weight)), load_library()
        weight.prepared["native"] = found
    return found


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type, without gaps; itself where nothing is to do."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _fail(error: int) -> NoReturn:
    if error == NO_SUCH_ROW:
        raise IndexError("an id lies outside the rows of the embedding")
    if error == NO_MEMORY:
        raise MemoryError("no memory for the workspace of a packed product")
    raise ValueError("the tensors of a packed weight contradict one another")


BACKEND = Backend(
    name="native",
    supports=supports,
    linear=linear,
    embedding=embedding,
    dequantize=dequantize,
)
