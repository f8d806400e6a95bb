"""A packed weight read one weight at a time, from the words of docs/format-packed.md alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from tests.reference.asymmetric import bits_of


def signed(words: Sequence[int], index: int, bits: int) -> int:
    """Code number `index` of a bitstream."""
    return bits_of(words, index * bits, bits) - 2 ** (bits - 1)


def dense(
    tensors: Mapping[str, Any],
    out: int,
    inputs: int,
    bits: int,
    *,
    pattern: str = "none",
    group: int = 0,
) -> list[list[float]]:
    """The weight (out, in); `tensors` are nested lists by the last part of their names.

    `group`: inputs of a group; 0: the whole row.
    """
    rows, used = [], 0
    for i in range(out):
        stored = _places(tensors, i, inputs, pattern)
        row = []
        for j in range(inputs):
            value = 0.0
            if j in stored:
                if pattern == "unstructured":
                    code, used = signed(tensors["weight"], used, bits), used + 1
                else:
                    code = signed(tensors["weight"][i], stored.index(j), bits)
                place = j // (group or inputs)
                zeros = tensors.get("weight_zero")
                zero = 0 if zeros is None else signed(zeros[i], place, bits)
                value = (code - zero) * _scale(tensors, i, place)
            row.append(value)
        rows.append(row)
    return rows


def _scale(tensors: Mapping[str, Any], i: int, place: int) -> float:
    """The scale of a group: a number, or a 6-bit code times the factor of the row."""
    scales = tensors["weight_scale"][i]
    if "weight_factor" in tensors:
        return signed(scales, place, 6) * float(tensors["weight_factor"][i][0])
    return float(scales[place])


def _places(tensors: Mapping[str, Any], i: int, inputs: int, pattern: str) -> list[int]:
    """Inputs of row i that are stored, in order."""
    if pattern == "unstructured":
        return [j for j in range(inputs) if bits_of(tensors["weight_mask"][i], j, 1)]
    if pattern == "2:4":
        pairs = tuple(combinations(range(4), 2))
        indices = [bits_of(tensors["weight_pattern"][i], 3 * b, 3) for b in range(inputs // 4)]
        return [4 * b + place for b, index in enumerate(indices) for place in pairs[index]]
    return list(range(inputs))
