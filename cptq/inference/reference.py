"""The operations in plain torch: unpack a tile of rows, multiply, discard the tile.

A tile is about `TILE` weights in whole rows. Besides the packed weight and the result, a forward
pass holds one tile (its bytes, and its values in the type of x). A matrix of one tile is multiplied
exactly as a dense one; with more tiles, columns of the result come from smaller products, in which
a BLAS may sum in another order. Unpacking takes about 4 ns per weight on one CPU thread, for any
number of tokens: fine for prompts and batches, slow for one token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from cptq.inference.operations import Backend, PackedWeight
from cptq.layouts.packed import ROW_BITS, count_pattern_bits
from cptq.numerics import grid
from cptq.numerics.levels import Spacing, to_levels
from cptq.numerics.packing import unpack_rows, unpack_values
from cptq.numerics.scale_grids import join_rows
from cptq.numerics.sparse import join_n_of_m, scatter_codes, unpack_range

#: weights unpacked at once
TILE = 1 << 19


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Multiply x (..., in) by the weight, tile by tile."""
    parts = [
        functional.linear(x, W_RI, None if bias is None else bias[start : start + len(W_RI)])
        for start, W_RI in _iterate_tiles(weight, x.dtype)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack only the requested rows."""
    if weight.mask is not None:
        raise ValueError("rows of a weight with a bitmask have no fixed position in the file")
    rows_RI = _unpack_dense(select_rows(weight, ids.reshape(-1)), dtype)
    return rows_RI.view(*ids.shape, weight.shape[1])


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return all tiles as one matrix."""
    return torch.cat([W_RI for _, W_RI in _iterate_tiles(weight, dtype)])


def _iterate_tiles(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, values of the rows) of consecutive tiles."""
    out, inputs = weight.shape
    rows, used = max(1, TILE // inputs), 0
    for start in range(0, out, rows):
        part = select_rows(weight, slice(start, start + rows))
        if part.mask is None:
            yield start, _unpack_dense(part, dtype)
            continue
        mask_RI = unpack_values(part.mask, 1, inputs).bool()
        count = int(mask_RI.sum())
        bits = weight.scheme.bits
        stored_N = _convert_to_signed(unpack_range(weight.codes, bits, used, used + count), bits)
        used += count
        codes_RI = scatter_codes(stored_N, mask_RI)
        yield start, _multiply_out(codes_RI, mask_RI, part, dtype)


def select_rows(weight: PackedWeight, rows: slice | Tensor) -> PackedWeight:
    """Return some rows as a weight of their own; codes under a bitmask are kept whole."""

    def pick(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[rows]

    scale = weight.scale[rows]
    return replace(
        weight,
        shape=(len(scale), weight.shape[1]),
        codes=weight.codes if weight.mask is not None else weight.codes[rows],
        scale=scale,
        factor=pick(weight.factor),
        zero=pick(weight.zero),
        mask=pick(weight.mask),
        pattern=pick(weight.pattern),
    )


def _unpack_dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return all values of a weight without a bitmask."""
    bits, inputs = weight.scheme.bits, weight.shape[1]
    if weight.scheme.kept_of is None:
        codes_RI = unpack_rows(weight.codes, bits, inputs)
        levels_RI = to_levels(codes_RI, Spacing(bits, weight.scheme.levels))
        return _multiply_out(levels_RI, None, weight, dtype)
    assert weight.pattern is not None
    kept, of = weight.scheme.kept_of
    pattern_RB = unpack_values(weight.pattern, count_pattern_bits(kept, of), inputs // of)
    stored_RK = unpack_rows(weight.codes, bits, inputs // of * kept)
    codes_RI, mask_RI = join_n_of_m(pattern_RB, stored_RK, kept, of)
    return _multiply_out(codes_RI, mask_RI, weight, dtype)


def _multiply_out(
    codes_RI: Tensor, mask_RI: Tensor | None, weight: PackedWeight, dtype: torch.dtype
) -> Tensor:
    """Return the values of codes; exact zeros outside the mask, also on an asymmetric grid."""
    zero_RG, scale_RG = weight.zero, weight.scale
    if zero_RG is not None:
        zero_RG = unpack_rows(zero_RG, weight.scheme.bits, scale_RG.shape[1])
    if weight.factor is not None:
        groups = weight.shape[1] // (weight.scheme.group_size or weight.shape[1])
        scale_RG = join_rows(unpack_rows(scale_RG, ROW_BITS, groups), weight.factor)
    return grid.dequantize(codes_RI, scale_RG, zero_RG, mask_RI, dtype=dtype)


def _convert_to_signed(values: Tensor, bits: int) -> Tensor:
    """Convert unsigned values of the bitstream to signed codes (int8)."""
    return (values - (1 << (bits - 1))).view(torch.int8)


BACKEND = Backend(
    name="reference",
    supports=lambda weight, dtype: dtype.is_floating_point,
    linear=linear,
    embedding=embedding,
    dequantize=dequantize,
)
