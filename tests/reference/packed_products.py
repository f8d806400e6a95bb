"""Products with packed weights in float64, from the words of docs/format-packed.md alone.

Bits are read through numpy's `unpackbits`, every weight is dequantized, and activations are rounded
to 8 bits in chunks of 32 in the way that `packed.h` describes: nothing is shared with the code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]
Floats = NDArray[np.float64]


def read_stream(words: Words, bits: int, count: int) -> NDArray[np.int64]:
    """The unsigned values (rows, count) of bitstreams (rows, words)."""
    flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    values = flat[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return (values << np.arange(bits)).sum(2)


def weight(
    codes: Words,
    scale: Floats | Words,
    factor: Floats | None,
    zero: Words | None,
    bits: int,
    inputs: int,
    group: int,
    levels: tuple[int, ...] | None = None,
) -> Floats:
    """The weight (out, in); `scale` holds numbers, or with `factor` words of 6-bit codes.

    `levels`: what a code stands for, where that is not the code itself.
    """
    groups, middle = inputs // group, 2 ** (bits - 1)
    unsigned = read_stream(codes, bits, inputs)
    q = unsigned - middle if levels is None else np.array(levels)[unsigned]
    z = 0 if zero is None else read_stream(zero, bits, groups) - middle
    s = scale.astype(np.float64)
    if factor is not None:
        products = (read_stream(scale.astype(np.int32), 6, groups) - 32) * factor
        s = products.astype(np.float32).astype(np.float64)
    z_OI = np.repeat(np.broadcast_to(z, s.shape), group, axis=1)
    return (q - z_OI) * np.repeat(s, group, axis=1)


def round_activations(x: NDArray[np.float32]) -> Floats:
    """x (tokens, in) as 8-bit codes times the scale of their chunk of 32."""
    rounded = np.empty(x.shape, dtype=np.float64)
    for start in range(0, x.shape[1], 32):
        part = x[:, start : start + 32]
        most = np.abs(part).max(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(part * (np.float32(127) / most))
        scale = most / np.float32(127)
        rounded[:, start : start + 32] = np.where(most > 0, codes * scale.astype(np.float64), 0.0)
    return rounded
