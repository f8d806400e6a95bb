"""Which of ggml's block types holds which of our choices, and in how many bytes. Pure Python.

A block is 32 weights along the inputs with one float16 scale; `cptq.numerics.gguf_blocks` packs
them. Codes of 2 and 3 bits lie in Q4_0 and those of 6 and 7 in Q8_0, exactly, with bits to spare.
"""

from __future__ import annotations

from collections.abc import Mapping

from cptq.numerics.groups import resolve_group
from cptq.types import Candidate, LayerSpec, TensorSpec

#: weights of one block
BLOCK = 32
#: bits of the codes -> type that holds them
TYPE_OF_BITS: Mapping[int, str] = {
    2: "Q4_0",
    3: "Q4_0",
    4: "Q4_0",
    5: "Q5_0",
    6: "Q8_0",
    7: "Q8_0",
    8: "Q8_0",
}
#: bits of a type's own codes
TYPE_BITS: Mapping[str, int] = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
BLOCK_BYTES: Mapping[str, int] = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}


class GgufLayout:
    """The `cptq.types.Layout` of GGUF's symmetric blocks; a weight becomes one tensor of bytes."""

    name = "gguf"

    def refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Everything but symmetric codes in groups that are whole blocks."""
        if not candidate.symmetric:
            return "an asymmetric grid, whose zero points float16 does not hold exactly"
        if candidate.sparsity:
            return "sparse, for which GGUF has no storage"
        if candidate.bits not in TYPE_OF_BITS:
            return f"{candidate.bits} bits, not 2 to 8"
        return shape_refusal(layer.shape[1], resolve_group(layer.shape[1], candidate.group_size))

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """One tensor of (out, bytes of a row)."""
        out, inputs = layer.shape
        row = inputs // BLOCK * BLOCK_BYTES[TYPE_OF_BITS[candidate.bits]]
        return (TensorSpec(name=layer.weight_name, dtype="U8", shape=(out, row)),)


def shape_refusal(inputs: int, group: int) -> str | None:
    """Why rows of so many inputs in such groups are no whole blocks; None where they are."""
    if inputs % BLOCK:
        return f"{inputs} inputs, which blocks of {BLOCK} do not divide"
    if group % BLOCK:
        return f"groups of {group}, which are no multiple of a block's {BLOCK}"
    return None


GGUF_LAYOUT = GgufLayout()
