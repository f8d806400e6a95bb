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


def pack_super_block(codes: list[int], scales: list[int], d: float, kind: str) -> bytes:
    """The bytes of a super-block of 256 codes and 16 scale codes, one bit field at a time."""
    size = {"Q6_K": 208, "Q3_K": 108}[kind]
    field = bytearray(size)
    for i, code in enumerate(codes):
        half, run, place = i // 128, i % 128 // 32, i % 32
        if kind == "Q6_K":
            u = code + 32
            field[64 * half + 32 * (run % 2) + place] |= (u & 15) << (4 * (run // 2))
            field[128 + 32 * half + place] |= (u >> 4) << (2 * run)
        else:
            u = code + 4
            field[32 + 32 * half + place] |= (u & 3) << (2 * run)
            field[place] |= (u >> 2) << (4 * half + run)
    for g, scale in enumerate(scales):
        if kind == "Q6_K":
            field[192 + g] = scale % 256
        else:
            s = scale + 32
            field[96 + g % 8] |= (s & 15) << (4 * (g // 8))
            field[96 + 8 + g % 4] |= (s >> 4) << (2 * (g // 4))
    return bytes(field) + struct.pack("<e", d)
