"""Which tensors a weight becomes in a `packed` checkpoint; described in docs/format-packed.md.

| tensor         | type             | shape                                  | there for         |
|----------------|------------------|----------------------------------------|-------------------|
| weight         | int32            | (out, words(in, b))                    | all codes stored  |
|                |                  | (words(stored, b),)                    | unstructured      |
|                |                  | (out, words(in N / M, b))              | N:M               |
| weight_scale   | float16, bfloat16 | (out, groups)                         | 16-bit scales     |
|                | int32            | (out, words(groups, 6))                | `row` scales      |
| weight_factor  | float16, bfloat16 | (out, 1)                              | `row` scales      |
| weight_zero    | int32            | (out, words(groups, b))                | asymmetric        |
| weight_mask    | int32            | (out, words(in, 1))                    | unstructured      |
| weight_pattern | int32            | (out, words(in / M, p))                | N:M               |

words(n, b) = ceil(n b / 32); p, the bits of one of C(M, N) patterns: 3 for 2:4, 7 for 4:8.
The codes keep the name of the dense weight on purpose: their shape is never the dense one,
and stock transformers raises on a shape that does not fit where it would fill
in random numbers for a name that is not there.

Pure Python, so that what is budgeted, written, read and refused cannot differ.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb

from cptq.layouts.groups import resolve_group
from cptq.layouts.levels import LEVELS
from cptq.types import Candidate, LayerSpec, TensorSpec

#: grows when a tensor changes its meaning; 2 added `row` scales, 3 patterns other than 2:4, 4 rules
#: of activation sparsity, 5 uneven levels
FORMAT_VERSION = 5
#: versions that this code reads
READABLE = (1, 2, 3, 4, 5)
#: the first version that can hold rules of activation sparsity
RULES_VERSION = 4
#: bits of a code of a `row` scale
ROW_BITS = 6
#: `quant_method` in config.json
METHOD = "cptq"
NEEDS = "cptq (pip install cptq, then `import cptq` before from_pretrained, or cptq.load)"
#: the weight file, or the index of its shards; not model.safetensors, so that whoever does not know
#: the method finds no weights instead of reading some of them
STEM = "cptq"
WEIGHT_FILES = (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
UNSTRUCTURED, TWO_OF_FOUR = "unstructured", "2:4"


def find_version(scheme: Candidate) -> int:
    """The first version that can hold a scheme."""
    if scheme.levels:
        return 5
    if scheme.kept_of and scheme.pattern != TWO_OF_FOUR:
        return 3
    return 2 if scheme.scales else 1


def count_pattern_bits(kept: int, of: int) -> int:
    """Bits of the index of one of the patterns of `kept` of `of`."""
    return (comb(of, kept) - 1).bit_length()


def count_words(count: int, bits: int) -> int:
    """32-bit words of `count` values."""
    return -(-count * bits // 32)


def count_stored(shape: tuple[int, int], scheme: Candidate) -> int:
    """How many weights an unstructured scheme stores: all but floor(sparsity * numel)."""
    numel = shape[0] * shape[1]
    return numel - int(scheme.sparsity * numel + 1e-9)  # 0.3 * 10 is 3, not 2.9999999999999996


def resolve_candidate(candidate: Candidate, inputs: int) -> Candidate:
    """The candidate with the group size that a layer of so many inputs really gets, and its scales
    as the format stores them: `k` scales are 16-bit ones here."""
    group = resolve_group(inputs, candidate.group_size)
    size = 0 if group == inputs else group
    return replace(candidate, group_size=size, scales=candidate.narrow_scales)


def explain_misfit(shape: tuple[int, int], scheme: Candidate) -> str | None:
    """Why the format cannot hold a weight of this shape under this scheme; None where it can."""
    if not 2 <= scheme.bits <= 8:
        return f"{scheme.bits} bits; 2 to 8 can be packed"
    if scheme.group_size and shape[1] % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {shape[1]} inputs"
    if scheme.sparsity and count_stored(shape, scheme) < 1:
        return f"a sparsity of {scheme.sparsity:g}, which stores no weight"
    if scheme.scales not in ("", "row"):
        return f"{scheme.scales} scales, which compressed-tensors has"
    if scheme.scales and not scheme.symmetric:
        return "row scales beside zero points"
    if scheme.levels:
        return explain_levels(scheme)
    if scheme.kept_of and shape[1] % scheme.kept_of[1]:
        of = scheme.kept_of[1]
        return f"{scheme.pattern} needs a multiple of {of} inputs, and there are {shape[1]}"
    return None


def explain_levels(scheme: Candidate) -> str | None:
    """Why a scheme cannot have its uneven levels; None where it can."""
    if scheme.bits not in LEVELS[scheme.levels]:
        known = " and ".join(map(str, LEVELS[scheme.levels]))
        return f"{scheme.levels} levels of {scheme.bits} bits; there are those of {known}"
    if not scheme.symmetric:
        return f"{scheme.levels} levels beside zero points"
    if scheme.sparsity:
        return f"{scheme.levels} levels of sparse weights, as none of them is 0"
    return None


def list_packed_tensors(
    name: str, shape: tuple[int, int], scale_dtype: str, scheme: Candidate
) -> tuple[TensorSpec, ...]:
    """The tensors of one module.

    Args:
        name: of the module.
        shape: (out, in), of an embedding (vocabulary, width), of a Conv1D as of a linear.
        scale_dtype: safetensors name of the scales' type.
        scheme: with a group size that divides `in` (see `resolved`).
    """
    out, inputs = shape
    groups = inputs // (scheme.group_size or inputs)
    codes: tuple[int, ...] = (out, count_words(inputs, scheme.bits))
    more: list[tuple[str, int]] = []
    if scheme.kept_of:
        kept, of = scheme.kept_of
        codes = (out, count_words(inputs // of * kept, scheme.bits))
        more.append(("weight_pattern", count_words(inputs // of, count_pattern_bits(kept, of))))
    elif scheme.sparsity:
        codes = (count_words(count_stored(shape, scheme), scheme.bits),)
        more.append(("weight_mask", count_words(inputs, 1)))
    if not scheme.symmetric:
        more.append(("weight_zero", count_words(groups, scheme.bits)))
    scales = (TensorSpec(name=f"{name}.weight_scale", dtype=scale_dtype, shape=(out, groups)),)
    if scheme.scales:
        more.append(("weight_scale", count_words(groups, ROW_BITS)))
        scales = (TensorSpec(name=f"{name}.weight_factor", dtype=scale_dtype, shape=(out, 1)),)
    return (
        TensorSpec(name=f"{name}.weight", dtype="I32", shape=codes),
        *scales,
        *(TensorSpec(name=f"{name}.{part}", dtype="I32", shape=(out, n)) for part, n in more),
    )


class PackedLayout:
    """The `cptq.layouts.Layout` of `packed`."""

    name = "packed"

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """What cannot be packed, or not in this kind of layer."""
        if candidate.float8:
            return "8-bit floats, which packed integers serve better"
        if not layer.plain:
            return "a module that does more than look up or multiply"
        if layer.kind == "embedding" and candidate.sparsity:
            return "a sparse embedding, whose rows would have no fixed place"
        if layer.expert:
            return "an expert, which transformers stacks with others when it loads them"
        return explain_misfit(layer.shape, resolve_candidate(candidate, layer.shape[1]))

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """See `packed_specs`."""
        scheme = resolve_candidate(candidate, layer.shape[1])
        return list_packed_tensors(layer.name, layer.shape, layer.scale_dtype, scheme)


PACKED_LAYOUT = PackedLayout()
