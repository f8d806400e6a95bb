"""Integer codes as ggml's symmetric K-type super-blocks of 256, bit for bit.

A weight is d c q: q its code, c the integer scale of its group of 16, d the float16 of the
super-block (`numerics.super_scales`).

| type | bytes | layout of a super-block                                          | stored |
|------|-------|------------------------------------------------------------------|--------|
| Q6_K | 210   | 128 bytes low, 64 bytes high, 16 signed bytes c, d (float16)     | q + 32 |
| Q3_K | 110   | 32 bytes high, 64 bytes low, 12 bytes c + 32 in 6 bits, d        | q + 4  |

Q6_K, for each half h (128 values) and l < 32, value 128 h + 32 k + l, k < 4: its low four bits are
in byte 64 h + 32 (k mod 2) + l of the low bytes, the low half of it for k < 2; its high two bits in
byte 32 h + l of the high bytes, at bit 2 k.
Q3_K, for the same h, k and l: the low two bits in byte 32 h + l, at bit 2 k; the third in byte l of
the high bytes, at bit 4 h + k. c + 32 of group g < 16: its low four bits in byte g mod 8, the low
half of it for g < 8; its high two bits in byte 8 + g mod 4, at bit 2 (g div 4).

Source: ggml's block_q6_K and block_q3_K (ggml-common.h, ggml-quants.c), tested against the gguf
package's own dequantization. ggml multiplies d c first and then q, in float32; d c is exact there
(11 + 7 bits), so it gives the very product of code and scale that cptq computes in float32. Nothing
is rounded here.

What fits: super-blocks and groups as above, codes of 6 and 3 bits, scales that `split_supers` takes
apart. Cost: O(out * in). Shapes: codes_OI int8 (out, in), scale_OG (out, in / 16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.layouts.gguf import (
    SUPER_BLOCK,
    SUPER_BYTES,
    SUPER_GROUP,
    SUPER_GROUPS,
    SUPER_MOST,
    SUPER_TYPES,
)
from cptq.numerics.super_scales import split_supers

_BITS = {kind: bits for bits, kind in SUPER_TYPES.items()}
#: a super-block is two halves of four runs of 32 values
_HALVES, _RUNS, _RUN = 2, 4, 32


def pack_super_blocks(codes_OI: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
    """The bytes of a weight, uint8 (out, super-blocks * bytes of one).

    Args:
        codes_OI: int8, in the range of the type (3 or 6 bits, signed).
        scale_OG: scales of groups of 16 inputs, codes times a factor per super-block.
        kind: a key of `SUPER_BYTES`.

    Raises:
        ValueError: a shape, a code or a scale that the type cannot hold.
    """
    (out, inputs), bits = codes_OI.shape, _BITS[kind]
    if inputs % SUPER_BLOCK or scale_OG.shape[1] * SUPER_GROUP != inputs:
        raise ValueError(
            f"{inputs} inputs in {scale_OG.shape[1]} groups are no super-blocks of {SUPER_BLOCK} "
            f"in groups of {SUPER_GROUP}"
        )
    half = 1 << (bits - 1)
    if codes_OI.numel() and not -half <= int(codes_OI.min()) <= int(codes_OI.max()) < half:
        raise ValueError(f"a code lies outside [{-half}, {half - 1}]")
    codes_OG, factor_OB = split_supers(scale_OG, SUPER_MOST[bits])
    blocks = inputs // SUPER_BLOCK
    u_OBHKL = (codes_OI + half).to(torch.uint8).view(out, blocks, _HALVES, _RUNS, _RUN)
    c_OBG = codes_OG.view(out, blocks, SUPER_GROUPS)
    d_OBD = factor_OB.contiguous().view(torch.uint8).view(out, blocks, 2)
    parts = _pack_6bit(u_OBHKL, c_OBG) if bits == 6 else _pack_3bit(u_OBHKL, c_OBG)
    return torch.cat([*parts, d_OBD], dim=-1).view(out, blocks * SUPER_BYTES[kind])


def _pack_6bit(u_OBHKL: Tensor, c_OBG: Tensor) -> tuple[Tensor, ...]:
    """Low bytes, high bytes and scales of Q6_K, each (out, blocks, bytes)."""
    low_OBHKL = u_OBHKL & 0xF
    low_OBHJL = low_OBHKL[..., :2, :] | (low_OBHKL[..., 2:, :] << 4)
    high_OBHL = _join_runs(u_OBHKL >> 4, 2)
    return low_OBHJL.flatten(2), high_OBHL.flatten(2), c_OBG.contiguous().view(torch.uint8)


def _pack_3bit(u_OBHKL: Tensor, c_OBG: Tensor) -> tuple[Tensor, ...]:
    """High bytes, low bytes and scales of Q3_K, each (out, blocks, bytes)."""
    third_OBRL = (u_OBHKL >> 2).flatten(2, 3).unsqueeze(2)  # one half of eight runs
    low_OBHL = _join_runs(u_OBHKL & 3, 2)
    return _join_runs(third_OBRL, 1).flatten(2), low_OBHL.flatten(2), _pack_scales(c_OBG)


def _join_runs(parts_OBHKL: Tensor, bits: int) -> Tensor:
    """Parts of so many bits of the runs of a half side by side in a byte, (..., halves, 32)."""
    places_K1 = bits * torch.arange(parts_OBHKL.shape[-2], device=parts_OBHKL.device).unsqueeze(1)
    return (parts_OBHKL << places_K1.to(torch.uint8)).sum(-2).to(torch.uint8)


def _pack_scales(c_OBG: Tensor) -> Tensor:
    """Scale codes of 6 bits in the 12 bytes of Q3_K."""
    s_OBG = (c_OBG + 32).to(torch.uint8)
    low_OBG = s_OBG & 0xF
    low_OBJ = low_OBG[..., :8] | (low_OBG[..., 8:] << 4)
    high_OBKJ = (s_OBG >> 4).unflatten(-1, (4, 4))
    return torch.cat([low_OBJ, _join_runs(high_OBKJ, 2)], dim=-1)
