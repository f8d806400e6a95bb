"""Which of ggml's block types holds which of our choices, and in how many bytes. Pure Python.

A block is 32 weights along the inputs with one float16 scale, and a float16 minimum where the grid
is asymmetric; `cptq.numerics.gguf_blocks` packs them. Symmetric codes of 2 and 3 bits lie in Q4_0
and those of 6 and 7 in Q8_0, exactly, with bits to spare. Asymmetric ones are of 4 or 5 bits.

A super-block is 256 weights in 16 groups, each with an integer scale, and one float16 factor:
candidates with `k` scales (`cptq.numerics.super_scales`), of 3 bits in Q3_K and of 6 in Q6_K;
`cptq.numerics.gguf_super_blocks` packs them.

IQ4_NL is Q4_0 with ggml's uneven levels (`layouts.levels`) in place of even ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cptq.layouts.groups import resolve_group
from cptq.layouts.levels import GGML_NONLINEAR, LEVELS
from cptq.types import SUPER_SCALES, Candidate, LayerSpec, TensorSpec

#: weights of one block
BLOCK = 32
#: weights of one super-block, of one of its groups, and how many groups that is
SUPER_BLOCK, SUPER_GROUP = 256, 16
SUPER_GROUPS = SUPER_BLOCK // SUPER_GROUP
#: bits of the codes of a super-block -> type that holds them, and its largest scale code
SUPER_TYPES: Mapping[int, str] = {3: "Q3_K", 6: "Q6_K"}
SUPER_MOST: Mapping[int, int] = {3: 31, 6: 127}
#: every tensor starts at a multiple of so many bytes
ALIGNMENT = 32
#: whether the grid is symmetric -> bits of the codes -> type that holds them
_TYPES: Mapping[bool, Mapping[int, str]] = {
    True: {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"},
    False: {4: "Q4_1", 5: "Q5_1"},
}
#: bits of a type's own codes
TYPE_BITS: Mapping[str, int] = {
    "Q4_0": 4,
    "Q5_0": 5,
    "Q8_0": 8,
    "Q4_1": 4,
    "Q5_1": 5,
    "IQ4_NL": 4,
}
BLOCK_BYTES: Mapping[str, int] = {
    "Q4_0": 18,
    "Q5_0": 22,
    "Q8_0": 34,
    "Q4_1": 20,
    "Q5_1": 24,
    "IQ4_NL": 18,
}
SUPER_BYTES: Mapping[str, int] = {"Q3_K": 110, "Q6_K": 210}


def find_type(candidate: Candidate) -> str | None:
    """The type that holds a candidate's codes; None where there is none."""
    if candidate.sparsity or candidate.float8 or candidate.scales not in ("", SUPER_SCALES):
        return None
    if candidate.levels:
        plain = candidate.symmetric and not candidate.scales
        plain = plain and candidate.bits in LEVELS[GGML_NONLINEAR]
        return "IQ4_NL" if plain and candidate.levels == GGML_NONLINEAR else None
    if candidate.scales:
        return SUPER_TYPES.get(candidate.bits) if candidate.symmetric else None
    return _TYPES[candidate.symmetric].get(candidate.bits)


def count_row_bytes(inputs: int, kind: str) -> int:
    """The bytes of a row of so many inputs, whole blocks of a type."""
    if kind in SUPER_BYTES:
        return inputs // SUPER_BLOCK * SUPER_BYTES[kind]
    return inputs // BLOCK * BLOCK_BYTES[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSizes:
    """What a GGUF file holds beside packed weights; its bytes are a plain sum.

    `frame`: metadata with the vocabulary, the list of tensors (an entry takes the same bytes
    whatever the type), and factors of rotary embeddings. `dense`: {tensor of the checkpoint: its
    bytes where it stays dense}; 0 where llama.cpp does without it.
    """

    frame: int
    dense: Mapping[str, int]


def count_block_bytes(bits: int) -> int:
    """The bytes of a symmetric block of so many bits: codes and a float16 scale."""
    return BLOCK * bits // 8 + 2


def align(nbytes: int) -> int:
    """The bytes that a tensor takes in the file."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class GgufLayout:
    """The `cptq.layouts.Layout` of GGUF's blocks; a weight becomes one tensor of bytes."""

    name = "gguf"

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Everything but codes that a type holds, in groups that are whole blocks."""
        if find_type(candidate) is None:
            return explain_type(candidate)
        group = resolve_group(layer.shape[1], candidate.group_size)
        return explain_shape(layer.shape[1], group, candidate)

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """One tensor of (out, bytes of a row)."""
        out, inputs = layer.shape
        kind = find_type(candidate)
        assert kind is not None
        row = count_row_bytes(inputs, kind)
        return (TensorSpec(name=layer.weight_name, dtype="U8", shape=(out, row)),)


def explain_type(candidate: Candidate) -> str:
    """Why no type holds a candidate."""
    if candidate.sparsity:
        return "sparse weights, for which it has no storage"
    if candidate.float8:
        return "8-bit floats"
    if candidate.scales not in ("", SUPER_SCALES):
        return f"{candidate.scales} scales"
    if candidate.levels:
        return f"codes of {candidate.bits} bits on {candidate.levels} levels, but of 4 on iq4nl"
    grid = "symmetric" if candidate.symmetric else "asymmetric"
    if candidate.scales:
        known = " and ".join(map(str, SUPER_TYPES))
        return f"{grid} codes of {candidate.bits} bits with k scales, but symmetric ones of {known}"
    known = ", ".join(map(str, _TYPES[candidate.symmetric]))
    return f"{grid} codes of {candidate.bits} bits, but of {known}"


def explain_shape(inputs: int, group: int, candidate: Candidate) -> str | None:
    """Why rows of so many inputs in such groups are no whole blocks; None where they are."""
    if candidate.scales:
        if inputs % SUPER_BLOCK:
            return f"{inputs} inputs, which super-blocks of {SUPER_BLOCK} do not divide"
        wrong = group != SUPER_GROUP
        return f"groups of {group}, where a super-block has {SUPER_GROUP}" if wrong else None
    if inputs % BLOCK:
        return f"{inputs} inputs, which blocks of {BLOCK} do not divide"
    if group % BLOCK:
        return f"groups of {group}, which are no multiple of a block's {BLOCK}"
    return None


GGUF_LAYOUT = GgufLayout()
