"""Contents of a checkpoint: tensors, layers, and the units that a plan decides on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

ModelKind = Literal["causal-lm", "masked-lm", "classifier", "encoder"]
LayerKind = Literal["linear", "conv1d", "embedding", "head"]

#: bytes per element, by the name of the dtype in safetensors
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
#: 8-bit floats that a checkpoint may store without scales
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One weight matrix of the model; lists of them are in forward order.

    `shape` is always (out_features, in_features) (embeddings: (vocabulary, width)), also for a
    Conv1D, whose tensor is `transposed` on disk. `dtype` is the storage type in the checkpoint.
    `fused` names the group that inference engines fuse the layer with, `tied_to` the layer whose
    tensor it shares, and `reason` why it is not compressible. `plain`: the module does nothing but
    multiply, or look up (some embeddings scale what they look up). `initialized`: transformers
    reads its weight when it loads the family, whatever the checkpoint holds.
    """

    name: str
    block: int | None
    role: str
    kind: LayerKind
    shape: tuple[int, int]
    dtype: str
    fused: str | None = None
    tied_to: str | None = None
    transposed: bool = False
    compressible: bool = True
    reason: str | None = None
    plain: bool = True
    initialized: bool = False

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def scale_dtype(self) -> str:
        """Storage type of the layer's scales: the checkpoint's, but 16 bits where that is wider.

        Stock transformers multiplies an expert's weight out in the type of its scales before it
        stacks the experts, so there the checkpoint's type is kept.
        """
        narrow = choose_16bit_dtype(self.dtype)
        return self.dtype if self.expert and self.dtype not in _FLOAT8 else narrow

    @property
    def expert(self) -> bool:
        """Whether the layer belongs to an expert of a mixture-of-experts model."""
        return is_expert(self.name)


def choose_16bit_dtype(dtype: str) -> str:
    """Return the 16-bit type for values of a storage type; 16-bit and integer types stay.

    Of 8-bit floats it is bfloat16, which holds them exactly and reaches further than both.
    """
    if dtype in _FLOAT8:
        return "BF16"
    return "F16" if dtype in ("F32", "F64") else dtype


def is_expert(name: str) -> bool:
    """Return whether a layer or tensor of this name belongs to an expert of a mixture.

    All model families that transformers knows have `.experts.` in such names.
    """
    return ".experts." in name


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The weights that get one candidate together: a linear, a fused group (q/k/v, gate/up), or a
    matrix of the vocabulary (token embeddings, output head), which lies in no block."""

    name: str
    block: int | None
    role: str
    layers: tuple[LayerSpec, ...]

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)


def count_end_blocks(blocks: int) -> int:
    """Return how many blocks at either end CPTQuant (arXiv 2412.03599) holds to be sensitive.

    30% of the blocks to the nearest whole number, halves up, and at least one.
    """
    return max(1, (3 * blocks + 5) // 10)
