"""Packed modules under `torch.compile`: operators that its tracer does not look into.

The tracer cannot follow what a packed module does (ctypes, kernels that are started from Python,
memory that is compared by address). While it traces, a packed module therefore calls an operator
`cptq::linear` or `cptq::embedding` with its input and its own number; when the compiled code runs,
the operator finds the module by that number and calls it as usual. Weights are no arguments of the
operator: they are constants of the compiled code, as in a CUDA graph.

What it is for: transformers compiles the decoding of a model on a GPU into CUDA graphs by itself
when its cache is static, and a graph has none of the time that Python needs to start each kernel:

    model.generate(**inputs, cache_implementation="static")

Limits: no gradients, no `torch.export`; the compiled code ends with the process. A CUDA graph goes
on with the weights, and with the rules on or off, that it was recorded with; models with sparse
weights or rules are therefore not compiled by `generate`. Compiling block by block compiles each
block anew, since each has its numbers: compile the whole model.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Computing(Protocol):
    """What an operator calls: a packed module."""

    def compute(self, x: Tensor) -> Tensor:
        """Map an input outside of `torch.compile`."""


_MODULES: WeakValueDictionary[int, Computing] = WeakValueDictionary()
_numbers = count()


def enroll(module: Computing) -> int:
    """Return a new number, by which operators find the module as long as it lives."""
    number = next(_numbers)
    _MODULES[number] = module
    return number


@torch.library.custom_op("cptq::linear", mutates_args=())
def linear(x: Tensor, number: int, out: int) -> Tensor:
    """Return what the module gives for x (..., in): (..., out) in the type of x."""
    return _MODULES[number].compute(x)


@linear.register_fake
def _(x: Tensor, number: int, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


@torch.library.custom_op("cptq::embedding", mutates_args=())
def embedding(ids: Tensor, number: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `ids` (...) of the module: (..., width)."""
    return _MODULES[number].compute(ids)


@embedding.register_fake
def _(ids: Tensor, number: int, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, width), dtype=dtype)
