"""Levels that are not evenly spaced, one table for each width; part of the packed format.

A code u of b bits stands for the integer LEVELS[kind][b][u] instead of u - 2^(b-1), times the
group's scale. Tables ascend, so codes are ordered as their levels are. Their spacing is that of
weights with a normal distribution: narrow around 0, wide at the ends.

| kind  | widths | from                                                                          |
|-------|--------|-------------------------------------------------------------------------------|
| nl    | 2 to 6 | `scripts/fit_levels`: least squared error of normal weights in groups of 32   |
| iq4nl | 4      | ggml's IQ4_NL (`kvalues_iq4nl` in ggml-common.h), for GGUF files              |

Levels lie in -127..127, so that a kernel can multiply them as bytes, those of `nl` up to 4 bits in
-64..64 (2 bits: -32..32), where one sum of 16 bits holds more products. Scales are signed
(`numerics.grid`), so a table need not be symmetric: its larger end serves whichever side of a
group needs it. No table has a 0, so sparse weights keep even spacing. `numerics.levels` says what
uneven spacing is worth. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping

#: the kinds: cptq's own, and ggml's
NONLINEAR, GGML_NONLINEAR = "nl", "iq4nl"

LEVELS: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    NONLINEAR: {
        2: (-27, -9, 4, 19),
        3: (-54, -33, -19, -8, 3, 14, 27, 44),
        4: (-59, -47, -37, -29, -22, -16, -10, -4, 1, 6, 11, 17, 23, 30, 39, 52),
        5: (
            -126,
            -113,
            -100,
            -87,
            -77,
            -68,
            -60,
            -53,
            -46,
            -40,
            -34,
            -28,
            -23,
            -17,
            -12,
            -7,
            -1,
            4,
            10,
            15,
            21,
            27,
            33,
            39,
            46,
            53,
            60,
            68,
            77,
            87,
            98,
            119,
        ),
        6: (
            -126,
            -119,
            -114,
            -105,
            -98,
            -92,
            -86,
            -81,
            -77,
            -72,
            -68,
            -64,
            -60,
            -56,
            -53,
            -49,
            -46,
            -42,
            -39,
            -36,
            -33,
            -30,
            -27,
            -24,
            -22,
            -19,
            -16,
            -14,
            -11,
            -8,
            -6,
            -3,
            -1,
            2,
            5,
            7,
            10,
            13,
            15,
            18,
            21,
            24,
            27,
            30,
            33,
            36,
            39,
            42,
            45,
            49,
            52,
            56,
            59,
            63,
            67,
            71,
            76,
            80,
            85,
            90,
            96,
            102,
            114,
            119,
        ),
    },
    GGML_NONLINEAR: {
        4: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    },
}


def get_levels(kind: str, bits: int) -> tuple[int, ...]:
    """The table of a kind and a width.

    Raises:
        ValueError: the kind has no such width.
    """
    if bits not in LEVELS[kind]:
        raise ValueError(f"no {kind} levels of {bits} bits")
    return LEVELS[kind][bits]
