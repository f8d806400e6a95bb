"""What float16 holds, and the nearest number of few significant bits, in exact fractions."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import floor


def half_holds(value: Fraction) -> bool:
    """By Python's own float16."""
    try:
        return Fraction(struct.unpack("<e", struct.pack("<e", float(value)))[0]) == value
    except OverflowError:
        return False


def nearest(value: Fraction, bits: int) -> set[Fraction]:
    """The nearest numbers of so many significant bits (two where they tie), by their definition."""
    unit = Fraction(1)
    while value / unit >= 2**bits:
        unit *= 2
    while value / unit < 2 ** (bits - 1):
        unit /= 2
    unit = max(unit, Fraction(1, 2**24))
    near = [floor(value / unit) * unit, (floor(value / unit) + 1) * unit]
    least = min(abs(value - x) for x in near)
    return {x for x in near if abs(value - x) == least}


def most_bits(offset: int) -> int:
    """The most significant bits such that every scale of so many times `offset` is a float16."""
    bits = 11
    while not all(half_holds(Fraction(m * offset)) for m in range(2 ** (bits - 1), 2**bits)):
        bits -= 1
    return bits
