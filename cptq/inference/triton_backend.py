"""The backend `triton`: packed products on a GPU; `triton_kernels` has the method.

| tokens       | computed by                                                            |
|--------------|------------------------------------------------------------------------|
| 1            | `multiply_one`: no tensor cores, whole rows                            |
| up to 32, 64 | `multiply_many`: tiles on tensor cores, the sum split while it helps   |
| more         | tiles of unpacked rows in the type of x, times x by torch              |

Groups that no chunk divides (of 24, say) take the last way from two tokens on. Only that way rounds
weights to the type of x. Activations are never rounded, whatever `operations.is_exact` says.

Cost of a call besides the product: some 20 microseconds of Python and the driver, about those of
`torch.nn.functional.linear`; a CUDA graph has none of it (`compiled`).

Limits: CUDA devices of compute capability 8.0 and later (or ROCm), float32, bfloat16 and float16,
no sparse weights, no gradients (an `x` that needs them is given to `reference`). Block sizes are
those that served best on an H100 (`scripts/bench_kernels --device cuda`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cptq.inference import reference
from cptq.inference.operations import Backend, PackedWeight
from cptq.layouts.levels import get_levels
from cptq.layouts.packed import ROW_BITS
from cptq.numerics.packing import count_words

TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: tokens above which unpacked tiles are multiplied by torch: codes that may straddle words, others
MOST_TOKENS = (32, 64)
#: weights unpacked at once for that: 128 MiB in 16 bits
TILE = 1 << 26
#: one token: rows of a program, and units at once, at least and at most
ROWS_OF_ONE, UNITS_OF_ONE = 4, (32, 128)
#: tokens of a block, and its rows
TOKENS, ROWS = (16, 32), 64
#: inputs of a chunk, largest first; tensor cores need 16
CHUNKS = (64, 32, 16)
#: programs per processor that hide the latency of memory, and the most parts of a sum
PROGRAMS, PARTS = 4, 16
#: processors that are assumed where there is no GPU (Triton's interpreter)
ASSUMED_PROCESSORS = 4
#: elements of a program of `add_parts`
BLOCK = 1024
#: {bytes of an x: stages of loads}: with 3, float32 exceeds the shared memory of RTX 30 and 40
STAGES = {2: 3, 4: 2}
#: rows and units of a program of `write_rows`
UNPACKED = (2, 128)
#: bytes of which every address must be a multiple where a start is repeated
ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the kernels take a weight.

    Attributes:
        tensors, sizes: their arguments.
        flags: their constants; `of_one`: those of `multiply_one`.
        units: of a row.
        chunk: inputs of a chunk of `multiply_many`; 0 where it cannot be used.
        most_tokens: up to so many are multiplied by kernels.
        starts: of `multiply_one`, by the types of its tensors: what starts the compiled kernel.
    """

    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]
    flags: dict[str, Any]
    of_one: dict[str, Any]
    units: int
    chunk: int
    most_tokens: int
    starts: dict[Any, Callable[..., None]] = field(default_factory=dict)


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
    if tokens > _find_shape(weight).most_tokens:
        return _multiply_unpacked(x, weight, bias)
    y = torch.empty((*leading, out), dtype=x.dtype, device=x.device)
    if y.numel():
        multiply = _multiply_one if tokens == 1 else _multiply_many
        with torch.cuda.device_of(x):
            multiply(x.contiguous(), weight, None if bias is None else bias.contiguous(), y)
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


def _multiply_one(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> None:
    """Start the kernel of a product of one token.

    Triton takes longer to look a compiled kernel up than the kernel takes: it is kept with the
    weight, and started itself where what Triton assumed of it holds (types, alignment).
    """
    shape, out = _find_shape(weight), weight.shape[0]
    operands = (x, *shape.tensors, bias, y, *shape.sizes)
    key = x.dtype, None if bias is None else bias.dtype
    start = shape.starts.get(key)
    aligned = all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in (x, bias, y))
    if start is not None and aligned:
        start(*operands, *shape.of_one.values())
        return
    grid = (ceil(out / ROWS_OF_ONE), 1, 1)
    compiled = _load_kernels().multiply_one[grid](
        *operands, **shape.of_one, num_warps=shape.of_one["BU"] // 32
    )
    if aligned and compiled is not None:  # None in the interpreter
        shape.starts[key] = compiled[grid]


def _multiply_many(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> None:
    """Start the kernels of a product of few tokens, and of its sum where it is split."""
    kernels, shape, (out, inputs) = _load_kernels(), _find_shape(weight), weight.shape
    tokens = x.numel() // inputs
    block = next((size for size in TOKENS if size >= tokens), max(TOKENS))
    across = ceil(tokens / block), ceil(out / ROWS)
    chunks = ceil(inputs / shape.chunk)
    parts, span = _split(chunks, prod(across), _count_processors(x.device))
    result, rest = y, bias
    if parts > 1:
        result, rest = y.new_empty((parts, tokens, out), dtype=torch.float32), None
    flags = {name: shape.flags[name] for name in ("BITS", "V")}
    kernels.multiply_many[(*across, parts)](
        *(x, *shape.tensors, rest, result, *shape.sizes),
        tokens,
        span,
        **flags,
        SPLIT=parts > 1,
        BM=block,
        BN=ROWS,
        BK=shape.chunk,
        num_stages=STAGES[x.element_size()],
    )
    if parts > 1:
        count = tokens * out
        grid = (ceil(count / BLOCK),)
        kernels.add_parts[grid](result, bias, y, count, out, parts, BLOCK=BLOCK)


def _split(chunks: int, programs: int, processors: int) -> tuple[int, int]:
    """Return into how many parts a sum over chunks is split, and the chunks of a part."""
    parts = max(1, min(PARTS, chunks, PROGRAMS * processors // programs))
    span = ceil(chunks / parts)
    return ceil(chunks / span), span


def _round_up(number: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _multiply_unpacked(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out, inputs = weight.shape
    if out * inputs <= TILE:
        bias_O = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, dequantize(weight, x.dtype), bias_O)
    x_TI, y = x.reshape(-1, inputs), x.new_empty((*x.shape[:-1], out))
    y_TO = y.view(-1, out)
    for start, W_RI in _iterate_tiles(weight, x.dtype):
        bias_R = None if bias is None else bias[start : start + len(W_RI)].to(x.dtype)
        y_TO[:, start : start + len(W_RI)] = functional.linear(x_TI, W_RI, bias_R)
    return y


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
    kernels, shape, (rows, units) = _load_kernels(), _find_shape(weight), UNPACKED
    grid = (ceil(count / rows), ceil(shape.units / units))
    with torch.cuda.device_of(y):
        kernels.write_rows[grid](
            *(ids, *shape.tensors, y, *shape.sizes), count, start, **shape.flags, BR=rows, BU=units
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
    group, unit = weight.scheme.group_size or inputs, count_unit(bits)
    chunk, units = choose_chunk(group, inputs, unit), ceil(inputs / unit)
    flags = {"BITS": bits, "V": unit, "REGULAR": group == inputs or group % unit == 0}
    least, most = UNITS_OF_ONE
    together = min(max(_round_up(units), least), most)
    widths = (
        part.shape[1] if part is not None else 0
        for part in (weight.codes, weight.scale, weight.zero)
    )
    return Shape(
        tensors=(weight.codes, weight.scale, weight.factor, weight.zero, _make_levels(weight)),
        sizes=(out, inputs, group, units, *widths),
        flags=flags,
        of_one=flags | {"BN": ROWS_OF_ONE, "BU": together},
        units=units,
        chunk=chunk,
        most_tokens=MOST_TOKENS[32 % bits == 0] if chunk else 1,
    )


def _make_levels(weight: PackedWeight) -> Tensor | None:
    """Return the table that codes look up, where levels are uneven."""
    kind, bits = weight.scheme.levels, weight.scheme.bits
    if not kind:
        return None
    return torch.tensor(get_levels(kind, bits), dtype=torch.int8, device=weight.codes.device)


def count_unit(bits: int) -> int:
    """Return the codes of a unit: as many as fill whole words."""
    return 32 // gcd(32, bits)


def choose_chunk(group: int, inputs: int, unit: int) -> int:
    """Return the inputs of a chunk: whole units that divide a group; 0 where there are none."""
    fitting = (size for size in CHUNKS if group in (inputs, size * (group // size)))
    return next((size for size in fitting if size % unit == 0), 0)


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
