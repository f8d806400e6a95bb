"""A bitstream, one bit at a time."""

from __future__ import annotations


def pack_row(codes: list[int], bits: int) -> list[int]:
    """Signed codes of one row as signed 32-bit words, least significant bit first."""
    stream = [
        ((code + 2 ** (bits - 1)) >> position) & 1 for code in codes for position in range(bits)
    ]
    stream += [0] * (-len(stream) % 32)
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << place for place, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words
