"""Operations on packed weights and the backends that compute them.

| operation  | takes                              | returns                   |
|------------|------------------------------------|---------------------------|
| linear     | x (..., in), weight, bias or None  | x W^T + b (..., out)      |
| embedding  | ids (...), weight, dtype           | rows of W (..., in)       |
| dequantize | weight, dtype                      | W (out, in)               |

A backend implements all three for the weights, devices and types that it supports. The first one in
`BACKENDS` that supports a weight is used. To add a fast one, write a file with a `Backend` and list
it above `reference`, which supports everything and is what the others are tested against.

A backend may round activations to 8 bits, as `native` does. `set_exact(True)`, `exact_products()`
or the environment variable CPTQ_EXACT=1 forbid it: products then are those of the dequantized
weight, but for the order of summation. What compares a packed model with a dense one wants that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cptq.registry import Entry, Facts, Registry
from cptq.types import Candidate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A packed weight (out, in): the tensors of docs/format-packed.md and their scheme.

    `scheme` has the group size in use (0: per channel). `cptq.layouts.packed` gives the shapes.
    `prepared` is where a backend keeps what it derives from the tensors, by its name.
    """

    scheme: Candidate
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    factor: Tensor | None = None
    zero: Tensor | None = None
    mask: Tensor | None = None
    pattern: Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        parts = (self.codes, self.scale, self.factor, self.zero, self.mask, self.pattern)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of the operations; `supports` takes a weight and the compute type."""

    name: str
    supports: Callable[[PackedWeight, torch.dtype], bool]
    linear: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
    embedding: Callable[[Tensor, PackedWeight, torch.dtype], Tensor]
    dequantize: Callable[[PackedWeight, torch.dtype], Tensor]


BACKENDS: Registry[Backend] = Registry(
    "backend",
    {
        "native": Entry(
            "cptq.inference.native.backend:BACKEND",
            Facts(
                does="products with packed weights in C, activations in 8 bits",
                cost="a C compiler at installation",
                good="CPUs: 4.6x to 9.5x the decoding of dense",
            ),
        ),
        "triton": Entry(
            "cptq.inference.triton_backend:BACKEND",
            Facts(
                does="the same products on a GPU",
                source="Triton",
                cost="pip install cptq[gpu]",
                good="GPUs: 1.3x to 2x the speed of bfloat16 at one token, in CUDA graphs",
            ),
        ),
        "reference": Entry(
            "cptq.inference.reference:BACKEND",
            Facts(
                does="dequantize, then torch's product",
                cost="dense memory of a layer",
                good="everything else; what the others are tested against",
            ),
        ),
    },
)

#: whether activations must not be rounded; for the whole process
_exact = os.environ.get("CPTQ_EXACT", "") == "1"


def is_exact() -> bool:
    """Return whether products must be those of the dequantized weight."""
    return _exact


def set_exact(exact: bool) -> None:
    """Forbid (or allow again) that a backend rounds activations, in the whole process."""
    global _exact
    _exact = exact


@contextmanager
def exact_products(exact: bool = True) -> Iterator[None]:
    """Forbid it (or allow it) for the time of a `with` block, in all threads."""
    before = is_exact()
    set_exact(exact)
    try:
        yield
    finally:
        set_exact(before)


def find_backend(weight: PackedWeight, dtype: torch.dtype) -> Backend:
    """Return the first backend that supports a weight.

    Raises:
        LookupError: no backend does.
    """
    for name in BACKENDS:
        backend = BACKENDS.get(name)
        if backend.supports(weight, dtype):
            return backend
    raise LookupError(f"no backend supports {weight.scheme.label} in {dtype}")


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + b in the type of `x`."""
    return find_backend(weight, x.dtype).linear(x, weight, bias)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the rows `ids` of the weight, (*ids.shape, in)."""
    return find_backend(weight, dtype).embedding(ids, weight, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the whole weight (out, in)."""
    return find_backend(weight, dtype).dequantize(weight, dtype)
