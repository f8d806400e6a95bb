"""The backend `triton`: packed products on a GPU; `triton_kernels` has the method.

| tokens    | computed by                                                          |
|-----------|----------------------------------------------------------------------|
| 1         | `multiply_one`: no tensor cores, the sum over inputs split           |
| up to 256 | `multiply_many`: tiles on tensor cores, the sum split while it helps |
| more      | tiles of unpacked rows in the type of x, times x by torch            |

Only the last row rounds weights to the type of x. Activations are never rounded, whatever
`operations.is_exact` says.

Limits: CUDA devices of compute capability 8.0 and later (or ROCm), float32, bfloat16 and float16,
no sparse weights, no gradients (an `x` that needs them is given to `reference`). Checked in
Triton's interpreter; not yet measured on a GPU: the constants below are guesses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cptq.inference import reference
from cptq.inference.operations import Backend, PackedWeight
from cptq.layouts.packed import ROW_BITS
from cptq.numerics.packing import count_words

TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: tokens above which unpacked tiles are multiplied by torch
MOST_TOKENS = 256
#: weights unpacked at once for that: 32 MiB in 16 bits
TILE = 1 << 24
#: rows of a block, and inputs that one token's kernel takes at once
ROWS, INPUTS = {1: 16, 16: 64, 32: 64, 64: 64}, 256
#: inputs of a chunk, largest first; tensor cores need 16
CHUNKS = (64, 32, 16)
#: share of a group that chunks may add to it
WASTE = 0.1
#: programs per processor that hide the latency of memory, and the most parts of a sum
PROGRAMS, PARTS = 4, 16
#: processors that are assumed where there is no GPU (Triton's interpreter)
ASSUMED_PROCESSORS = 4
#: chunks that a program of `write_rows` writes, and elements of one of `add_parts`
SPAN, BLOCK = 8, 1024
#: stages of loads: with 3, float32 tiles exceed the shared memory of RTX 30 and 40; codes that may
#: straddle words would be copied there one by one
STAGES = {True: 2, False: 1}
#: rows of a block of `write_rows`
UNPACKED_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the kernels take a weight: `tensors` and `sizes` are arguments, `flags` constants."""

    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    flags: dict[str, Any]
    chunk: int
    chunks: int


def supports(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the weight is on a GPU that Triton compiles for, and not sparse."""
    scales = weight.scale if weight.factor is None else weight.factor
    return (
        weight.codes.is_cuda
        and weight.mask is None
        and weight.pattern is None
        and dtype in TYPES
        and scales.dtype in TYPES
        and is_available(weight.codes.device)
    )


@cache
def is_available(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device; if not, a warning says so once."""
    obstacle = _find_obstacle(device)
    if obstacle is not None:
        warnings.warn(
            f"packed weights on {device} are computed slowly, with plain torch: {obstacle}",
            RuntimeWarning,
            stacklevel=2,
        )
    return obstacle is None


def _find_obstacle(device: torch.device) -> str | None:
    try:
        _load_kernels()
    except ImportError as error:
        return (
            f"triton is missing ({error}); torch's CUDA builds for Linux bring it, and "
            '`pip install "cptq[gpu]"` installs it alone'
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _load_kernels() -> Any:
    """Import the kernels, which takes a second and needs triton."""
    from cptq.inference import triton_kernels

    return triton_kernels


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + b."""
    out, inputs = weight.shape
    *leading, width = x.shape
    if width != inputs or x.device != weight.codes.device:
        raise RuntimeError(
            f"x {tuple(x.shape)} on {x.device} and a weight {weight.shape} on {weight.codes.device}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        return reference.linear(x, weight, bias)
    tokens = prod(leading)
    if tokens > MOST_TOKENS:
        return _multiply_unpacked(x, weight, bias)
    y = torch.empty((*leading, out), dtype=x.dtype, device=x.device)
    if y.numel():
        with torch.cuda.device_of(x):
            bias_O = None if bias is None else bias.contiguous()
            _multiply(x.contiguous(), weight, bias_O, y, tokens)
    return y


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack only the requested rows; those that do not exist are NaN."""
    rows = torch.empty((*ids.shape, weight.shape[1]), dtype=dtype, device=weight.codes.device)
    _unpack(weight, rows, ids.to(weight.codes.device).contiguous(), 0, ids.numel())
    return rows


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the whole weight."""
    W_OI = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    _unpack(weight, W_OI, None, 0, weight.shape[0])
    return W_OI


def _multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, tokens: int) -> None:
    """Start the kernels of a product of few tokens, and of its sum where it is split."""
    kernels, shape, out = _load_kernels(), _find_shape(weight), weight.shape[0]
    block = next((size for size in ROWS if size >= tokens), max(ROWS))
    together = max(1, INPUTS // shape.chunk) if block == 1 and shape.flags["EVEN"] else 1
    across = ceil(tokens / block), ceil(out / ROWS[block])
    parts, span = _split(shape.chunks, together, prod(across), _count_processors(x.device))
    result, rest = y, bias
    if parts > 1:
        result, rest = y.new_empty((parts, tokens, out), dtype=torch.float32), None
    constants = shape.flags | {"SPLIT": parts > 1, "BN": ROWS[block], "BK": shape.chunk}
    operands = (x, *shape.tensors, rest, result, *shape.sizes)
    if block == 1:
        kernels.multiply_one[(across[1], parts)](*operands, span, **constants, C=together)
    else:
        kernels.multiply_many[(*across, parts)](
            *operands, tokens, span, **constants, BM=block, num_stages=STAGES[shape.flags["WHOLE"]]
        )
    if parts > 1:
        count = tokens * out
        grid = (ceil(count / BLOCK),)
        kernels.add_parts[grid](result, bias, y, count, out, parts, BLOCK=BLOCK)


def _split(chunks: int, together: int, programs: int, processors: int) -> tuple[int, int]:
    """Return into how many parts a sum over chunks is split, and the chunks of a part.

    Parts begin at multiples of the chunks that are taken `together`.
    """
    steps = ceil(chunks / together)
    parts = max(1, min(PARTS, steps, PROGRAMS * processors // programs))
    span = ceil(steps / parts) * together
    return ceil(chunks / span), span


def _multiply_unpacked(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    parts = []
    for start, W_RI in _iterate_tiles(weight, x.dtype):
        bias_R = None if bias is None else bias[start : start + len(W_RI)].to(x.dtype)
        parts.append(functional.linear(x, W_RI, bias_R))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _iterate_tiles(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows); the memory of the rows is used again."""
    out, inputs = weight.shape
    rows = max(1, TILE // inputs)
    buffer_RI = torch.empty((min(rows, out), inputs), dtype=dtype, device=weight.codes.device)
    for start in range(0, out, rows):
        count = min(rows, out - start)
        _unpack(weight, buffer_RI, None, start, count)
        yield start, buffer_RI[:count]


def _unpack(weight: PackedWeight, y: Tensor, ids: Tensor | None, start: int, count: int) -> None:
    """Write the rows `ids`, or `count` rows from `start`, to the beginning of `y`."""
    if not count:
        return
    kernels, shape = _load_kernels(), _find_shape(weight)
    grid = (ceil(count / UNPACKED_ROWS), ceil(shape.chunks / SPAN))
    with torch.cuda.device_of(y):
        kernels.write_rows[grid](
            ids,
            *shape.tensors,
            y,
            *shape.sizes,
            count,
            start,
            SPAN,
            **shape.flags,
            BR=UNPACKED_ROWS,
            BK=shape.chunk,
        )


def _find_shape(weight: PackedWeight) -> Shape:
    """Return how the kernels take a weight, which is found once."""
    found: Shape | None = weight.prepared.get("triton")
    if found is None:
        weight.prepared["triton"] = found = _describe(weight)
    return found


def _describe(weight: PackedWeight) -> Shape:
    _check(weight)
    (out, inputs), bits = weight.shape, weight.scheme.bits
    group = weight.scheme.group_size or inputs
    chunk = choose_chunk(group)
    per_group = ceil(group / chunk)
    chunks = per_group * (inputs // group)
    widths = (
        part.shape[1] if part is not None else 0
        for part in (weight.codes, weight.scale, weight.zero)
    )
    return Shape(
        tensors=(weight.codes, weight.scale, weight.factor, weight.zero),
        sizes=(out, inputs, group, per_group, chunks, *widths),
        flags={
            "BITS": bits,
            "EVEN": group % chunk == 0,
            "WHOLE": 32 % bits == 0 and (group == inputs or group * bits % 32 == 0),
        },
        chunk=chunk,
        chunks=chunks,
    )


def choose_chunk(group: int) -> int:
    """Return the inputs of a chunk: the largest that adds little to a group."""
    fitting = (size for size in CHUNKS if ceil(group / size) * size <= (1 + WASTE) * group)
    return next(fitting, CHUNKS[-1])


def _check(weight: PackedWeight) -> None:
    """Refuse tensors that the kernels would read beyond their ends."""
    (out, inputs), bits = weight.shape, weight.scheme.bits
    groups = inputs // (weight.scheme.group_size or inputs)
    scales = groups if weight.factor is None else count_words(groups, ROW_BITS)
    expected = (
        (weight.codes, count_words(inputs, bits)),
        (weight.scale, scales),
        (weight.factor, 1),
        (weight.zero, count_words(groups, bits)),
    )
    for tensor, width in expected:
        if tensor is not None and (tensor.shape != (out, width) or not tensor.is_contiguous()):
            raise ValueError(f"the tensors of a packed weight do not fit {weight.scheme.label}")


@cache
def _count_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


BACKEND = Backend(
    name="triton",
    supports=supports,
    linear=linear,
    embedding=embedding,
    dequantize=dequantize,
)
