"""The operations on packed weights, and who does them: the only place where that is chosen.

| operation  | takes                              | gives                     |
|------------|------------------------------------|---------------------------|
| linear     | x (..., in), weight, bias or None  | x W^T + b (..., out)      |
| embedding  | ids (...), weight, dtype           | rows of W (..., in)       |
| dequantize | weight, dtype                      | W (out, in)               |

A backend does all three for the weights, devices and types that it supports. They are asked in the
order of `BACKENDS`, so a fast one is a file with a `Backend` and a line above `reference`, which
does everything and is what the others are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cptq.inference.weight import PackedWeight
from cptq.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of the operations; `supports` gets the weight and the type to run in."""

    name: str
    supports: Callable[[PackedWeight, torch.dtype], bool]
    linear: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
    embedding: Callable[[Tensor, PackedWeight, torch.dtype], Tensor]
    dequantize: Callable[[PackedWeight, torch.dtype], Tensor]


BACKENDS: Registry[Backend] = Registry("backend", {"reference": "cptq.inference.reference:BACKEND"})


def find_backend(weight: PackedWeight, dtype: torch.dtype) -> Backend:
    """The first backend that can work on a weight.

    Raises:
        LookupError: none can.
    """
    for name in BACKENDS:
        backend = BACKENDS.get(name)
        if backend.supports(weight, dtype):
            return backend
    raise LookupError(f"nothing computes with {weight.scheme.label} in {dtype}")


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b, in the type of `x`."""
    return find_backend(weight, x.dtype).linear(x, weight, bias)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight by number, (*ids.shape, in)."""
    return find_backend(weight, dtype).embedding(ids, weight, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The whole weight (out, in)."""
    return find_backend(weight, dtype).dequantize(weight, dtype)
