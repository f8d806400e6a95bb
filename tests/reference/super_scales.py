"""Scales of super-blocks, found by trying every factor and every code in exact fractions."""

from __future__ import annotations

from fractions import Fraction

#: the smallest float16
UNIT = Fraction(1, 1 << 24)


def list_factors(bits: int, top: int) -> list[Fraction]:
    """All factors of so many significant bits that are multiples of the smallest float16, up to
    2^top, in order."""
    found = {
        odd * Fraction(2) ** power
        for odd in range(1, 1 << bits)
        for power in range(-24, top + 1)
        if odd * Fraction(2) ** power <= Fraction(2) ** top
    }
    return sorted(found)


def round_block(scales: list[float], most: int, bits: int, top: int) -> tuple[Fraction, list[int]]:
    """The factor and the codes of one super-block; `bits` of the factor, at most 2^top."""
    wanted = [Fraction(s) for s in scales]
    largest = max(map(abs, wanted))
    factors = list_factors(bits, top)
    d = next((f for f in factors if f * most >= largest), factors[-1])
    codes = []
    for s in wanted:
        code = min(range(1, most + 1), key=lambda c: (abs(abs(s) - c * d), c % 2))
        codes.append(-code if s < 0 else code)
    return d, codes
