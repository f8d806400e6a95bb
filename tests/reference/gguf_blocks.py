"""ggml's blocks read one value at a time, from the definitions in ggml-common.h."""

from __future__ import annotations

import struct


def unpack_block(raw: bytes, kind: str) -> list[float]:
    """The 32 weights of a block in float64."""
    (d,) = struct.unpack("<e", raw[:2])
    if kind == "Q8_0":
        return [d * q for q in struct.unpack("<32b", raw[2:])]
    half = 16 if kind.startswith("Q5") else 8
    minimum, rest = -d * half, raw[2:]
    if kind.endswith("_1"):
        (minimum,), rest = struct.unpack("<e", raw[2:4]), raw[4:]
    high = struct.unpack("<I", rest[:4])[0] if kind.startswith("Q5") else 0
    low = rest[4:] if kind.startswith("Q5") else rest
    values = []
    for j in range(32):
        nibble = low[j] & 0xF if j < 16 else low[j - 16] >> 4
        fifth = (high >> j) & 1
        values.append(d * (nibble | fifth << 4) + minimum)
    return values
