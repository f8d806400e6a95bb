"""Integer codes as ggml's blocks of 32, bit for bit.

| type   | bytes | layout of a block                                       | weight       |
|--------|-------|---------------------------------------------------------|--------------|
| Q4_0   | 18    | d (float16), 16 bytes                                   | d * (u - 8)  |
| Q5_0   | 22    | d (float16), 32 fifth bits (uint32), 16 bytes           | d * (u - 16) |
| Q8_0   | 34    | d (float16), 32 signed bytes                            | d * q        |
| Q4_1   | 20    | d, m (float16), 16 bytes                                | d * u + m    |
| Q5_1   | 24    | d, m (float16), 32 fifth bits (uint32), 16 bytes        | d * u + m    |
| IQ4_NL | 18    | d (float16), 16 bytes                                   | d * l_u      |

Byte j of the 16 holds the low four bits of value j (low half) and of value j + 16 (high half);
bit j of the uint32 is the fifth bit of value j. Source: ggml's block definitions
(ggml-common.h, ggml-quants.c), tested against the gguf package's own dequantization.

What fits: codes of fewer bits fit into the next wider block (2, 3 -> Q4_0; 6, 7 -> Q8_0), groups of
a multiple of 32 are that many blocks of equal d, and d may be negative. So a layer is held exactly
if 32 divides its inputs and its group, and float16 holds its scales. An asymmetric weight is
d * (q - z), so u = q + half and m = -d * (z + half), half being 2^(bits of the type - 1): float16
must hold that product, which `float16_offset` in `numerics.grid` sees to. l are the levels of
`iq4nl` (`layouts.levels`), which a layer has in place of codes. Nothing is rounded here.

Cost: O(out * in). Shapes: codes_OI int8 (out, in), scale_OG and zero_OG (out, groups), bytes
(out, bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.layouts.gguf import BLOCK, BLOCK_BYTES, TYPE_BITS
from cptq.layouts.levels import GGML_NONLINEAR
from cptq.numerics.grid import to_unsigned
from cptq.numerics.levels import Spacing, to_codes


def fits_float16(scale_OG: Tensor) -> bool:
    """Whether float16 holds every scale exactly."""
    half = scale_OG.to(torch.float16)
    return bool((torch.isfinite(half) & (half.to(scale_OG.dtype) == scale_OG)).all())


def compute_minimum(scale_OG: Tensor, zero_OG: Tensor, kind: str) -> Tensor:
    """m, the weight of the smallest code, float64 and exact; shape of the scales."""
    return scale_OG.double() * -to_unsigned(zero_OG, TYPE_BITS[kind])


def pack_blocks(
    codes_OI: Tensor, scale_OG: Tensor, kind: str, zero_OG: Tensor | None = None
) -> Tensor:
    """The bytes of a weight, uint8 (out, blocks * block bytes).

    Args:
        codes_OI: int8, in the range of the type (4, 5 or 8 bits, signed), or levels of IQ4_NL.
        scale_OG: scales that float16 holds; a group is a multiple of 32 inputs.
        kind: a key of `BLOCK_BYTES`.
        zero_OG: zero points int8, for the types with a minimum (which float16 must hold).

    Raises:
        ValueError: a shape, a code or a scale that the type cannot hold.
    """
    out, inputs = codes_OI.shape
    blocks = inputs // BLOCK
    if inputs % BLOCK or blocks % scale_OG.shape[1]:
        raise ValueError(f"{inputs} inputs in {scale_OG.shape[1]} groups are no blocks of {BLOCK}")
    if (zero_OG is not None) != (kind in _WITH_MINIMUM):
        raise ValueError(f"{kind} holds {'a' if kind in _WITH_MINIMUM else 'no'} minimum")
    numbers = (
        [scale_OG] if zero_OG is None else [scale_OG, compute_minimum(scale_OG, zero_OG, kind)]
    )
    if kind == "IQ4_NL":
        codes_OI = to_codes(codes_OI, Spacing(TYPE_BITS[kind], GGML_NONLINEAR))
    _check_range(codes_OI, TYPE_BITS[kind])
    heads_OBD = [_encode_float16(x_OG, blocks) for x_OG in numbers]
    body_OBD = _BODIES[kind](codes_OI.view(out, blocks, BLOCK))
    return torch.cat([*heads_OBD, body_OBD], dim=-1).view(out, blocks * BLOCK_BYTES[kind])


def _encode_float16(x_OG: Tensor, blocks: int) -> Tensor:
    """Numbers per group as the two bytes of a float16 in each block, (out, blocks, 2)."""
    if not fits_float16(x_OG):
        raise ValueError("a scale or a minimum is not exact in float16")
    x_OB = x_OG.to(torch.float16).repeat_interleave(blocks // x_OG.shape[1], dim=1)
    return x_OB.contiguous().view(torch.uint8).view(len(x_OG), blocks, 2)


def _check_range(codes_OI: Tensor, bits: int) -> None:
    half = 1 << (bits - 1)
    if codes_OI.numel() and not -half <= int(codes_OI.min()) <= int(codes_OI.max()) < half:
        raise ValueError(f"a code lies outside [{-half}, {half - 1}]")


def _pack_nibbles(u_OBK: Tensor) -> Tensor:
    """The low four bits of values j and j + 16 in byte j."""
    low_OBK = u_OBK & 0xF
    return low_OBK[..., :16] | (low_OBK[..., 16:] << 4)


def _pack_4bit(codes_OBK: Tensor) -> Tensor:
    return _pack_nibbles((codes_OBK + 8).to(torch.uint8))


def _pack_5bit(codes_OBK: Tensor) -> Tensor:
    u_OBK = (codes_OBK + 16).to(torch.uint8)
    fifth_OBK = (u_OBK >> 4).view(*u_OBK.shape[:-1], 4, 8)
    places = torch.arange(8, device=u_OBK.device, dtype=torch.uint8)
    high_OBD = (fifth_OBK << places).sum(-1).to(torch.uint8)  # little-endian uint32
    return torch.cat([high_OBD, _pack_nibbles(u_OBK)], dim=-1)


def _pack_8bit(codes_OBK: Tensor) -> Tensor:
    return codes_OBK.contiguous().view(torch.uint8)


_BODIES = {
    "Q4_0": _pack_4bit,
    "Q5_0": _pack_5bit,
    "Q8_0": _pack_8bit,
    "Q4_1": _pack_4bit,
    "Q5_1": _pack_5bit,
    "IQ4_NL": _pack_4bit,
}
_WITH_MINIMUM = ("Q4_1", "Q5_1")
