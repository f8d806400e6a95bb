"""Which tensors a compressed linear becomes in a `pack-quantized` checkpoint.

| tensor        | type                    | shape                      |
|---------------|-------------------------|----------------------------|
| weight_packed | int32                   | (out, ceil(in * bits / 32)) |
| weight_scale  | the weight's, at most 16 bits; or 8-bit float | (out, groups) |
| weight_shape  | int64                   | (2,)                       |

Token embeddings and output heads can also be stored as 8-bit floats, one tensor `weight` of type
F8_E4M3 or F8_E5M2, which stock loaders convert to the model's type while they read it.

Pure Python, so that what is budgeted and what is written cannot differ.
"""

from __future__ import annotations

from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, LayerSpec, TensorSpec

#: why a layer that is `initialized` is refused
INITIALIZED = "a layer whose weight transformers' code for the family reads as it loads it"
#: tensors of one packed layer
PACKED_TENSORS = 3


class PackQuantized:
    """The `cptq.layouts.Layout` of compressed-tensors' `pack-quantized`."""

    name = "compressed-tensors"

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate) -> str | None:
        """Everything but symmetric linears of 2 to 8 bits without sparsity, and 8-bit floats of the
        vocabulary."""
        if candidate.float8:
            vocabulary = layer.kind in ("embedding", "head")
            return None if vocabulary else "8-bit floats, which are for embeddings and heads"
        if layer.transposed or layer.kind == "conv1d":
            return "a Conv1D, whose packed weights stock transformers replaces by random ones"
        if layer.kind == "embedding":
            return "an embedding, which the format has in 16 bits or as 8-bit floats"
        if layer.initialized:
            return INITIALIZED
        if candidate.scales == "row" or (candidate.scales and layer.expert):
            return "scales in another form than stock transformers multiplies with"
        if not candidate.symmetric:
            return "an asymmetric grid, which stock transformers does not load"
        if candidate.levels:
            return "uneven levels, where stock transformers multiplies integers"
        if candidate.sparsity:
            return "sparse, for which the format has no storage"
        return None if 2 <= candidate.bits <= 8 else f"{candidate.bits} bits, not 2 to 8"

    def tensors(self, layer: LayerSpec, candidate: Candidate) -> tuple[TensorSpec, ...]:
        """See `packed_tensors`."""
        if candidate.float8:
            return (list_float8_tensor(layer, candidate),)
        inputs = layer.shape[1]
        groups = inputs // resolve_group(inputs, candidate.group_size)
        kind = candidate.narrow_scales
        narrow = name_float8_dtype(kind) if kind else None
        return list_packed_tensors(layer, candidate.bits, groups, narrow)


PACK_QUANTIZED = PackQuantized()


def list_float8_tensor(layer: LayerSpec, candidate: Candidate) -> TensorSpec:
    """The one tensor of a weight of 8-bit floats."""
    dtype = name_float8_dtype(candidate.float8)
    return TensorSpec(name=layer.weight_name, dtype=dtype, shape=layer.shape)


def name_float8_dtype(kind: str) -> str:
    """The name in safetensors of `e4m3` or `e5m2`."""
    return f"F8_{kind.upper()}"


def list_packed_tensors(
    layer: LayerSpec, bits: int, groups: int, scale_dtype: str | None = None
) -> tuple[TensorSpec, ...]:
    """The three tensors of a compressed layer; `groups` scales per output row.

    `scale_dtype`: where the scales have another type than a layer compressed now gets.
    """
    out, inputs = layer.shape
    words = -(-inputs * bits // 32)
    return (
        TensorSpec(name=f"{layer.name}.weight_packed", dtype="I32", shape=(out, words)),
        TensorSpec(
            name=f"{layer.name}.weight_scale",
            dtype=scale_dtype or layer.scale_dtype,
            shape=(out, groups),
        ),
        TensorSpec(name=f"{layer.name}.weight_shape", dtype="I64", shape=(2,)),
    )
