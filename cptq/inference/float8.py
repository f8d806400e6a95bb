"""Embeddings and output heads that stay 8-bit floats in memory.

One byte per weight, e4m3 or e5m2 (`cptq.numerics.float8`), as the file has it. An embedding
converts the rows that it looks up. A head converts tiles of half a million weights, multiplies with
each in float32 and drops it, so that a token never costs a dense copy; the C library converts, or
plain torch where it is missing (1 to 5 ns a weight).

The bytes are a parameter of type uint8, so that `model.dtype`, `model.half()` and the like, which
look for floats, neither find nor convert them. What comes out has the model's type, which an empty
buffer, converted with the model, remembers. Neither module is trainable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from cptq.inference import reference
from cptq.inference.native.library import describe_dense, has_library, load_library
from cptq.numerics.float8 import FORMATS

#: in safetensors -> `numerics.float8`
STORED = {f"F8_{kind.upper()}": kind for kind in FORMATS}
#: bits of a byte, sign aside, from which on it is infinite or not a number
_FIRST_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}


class Float8Module(nn.Module):
    """Base of both: a weight (out, in) of 8-bit floats, `kind` "e4m3" or "e5m2"."""

    weight: nn.Parameter
    like: Tensor

    def __init__(self, shape: tuple[int, int], kind: str) -> None:
        super().__init__()
        self.shape, self.kind = shape, kind
        codes_OI = torch.zeros(shape, dtype=torch.uint8)
        self.weight = nn.Parameter(codes_OI, requires_grad=False)
        self.register_buffer("like", torch.zeros(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's type."""
        return self.like.dtype

    @property
    def floats(self) -> Tensor:
        """The weight as 8-bit floats, in the same memory."""
        return self.weight.detach().view(FORMATS[self.kind])

    def is_finite(self) -> bool:
        """Return whether no weight is infinite or not a number."""
        limit = _FIRST_NOT_FINITE[self.kind]
        parts = self.weight.detach().split(_count_rows(self.shape))
        return not any(bool(((part & 0x7F) >= limit).any()) for part in parts)

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.kind}"


class Float8Embedding(Float8Module):
    """An embedding: rows of W (vocabulary, width), converted on access."""

    def __init__(
        self, shape: tuple[int, int], kind: str, *, padding_idx: int | None = None
    ) -> None:
        super().__init__(shape, kind)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (...) to (..., width) in the model's type."""
        rows = functional.embedding(ids, self.weight.detach())
        return rows.view(FORMATS[self.kind]).to(self.dtype)

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        module = nn.Embedding(1, 1)
        module.num_embeddings, module.embedding_dim = self.shape
        module.padding_idx = self.padding_idx
        module.weight = nn.Parameter(self.floats.to(dtype), requires_grad=False)
        return module


class Float8Linear(Float8Module):
    """A linear layer, such as an output head: x W^T + b."""

    def __init__(self, shape: tuple[int, int], kind: str, *, bias: bool) -> None:
        super().__init__(shape, kind)
        self.out_features, self.in_features = shape
        empty = nn.Parameter(torch.zeros(shape[0]), requires_grad=False) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", empty)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        x_TI = x.float()
        bias_O = None if self.bias is None else self.bias.float()
        y = x_TI.new_empty(*x.shape[:-1], self.out_features)
        for start, W_RI in self._iterate_tiles():
            rows = slice(start, start + len(W_RI))
            y[..., rows] = functional.linear(x_TI, W_RI, None if bias_O is None else bias_O[rows])
        return y.to(x.dtype)

    def _iterate_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows as float32); the memory of the rows may be used again."""
        out, inputs = self.shape
        rows = _count_rows(self.shape)
        floats_OI = self.floats.contiguous()
        if not floats_OI.is_cpu or not has_library():
            yield from ((s, floats_OI[s : s + rows].float()) for s in range(0, out, rows))
            return
        dense, library = describe_dense(floats_OI), load_library()
        buffer_RI = torch.empty(min(rows, out), inputs)
        for start in range(0, out, rows):
            count = min(rows, out - start)
            library.cptq_dense_rows(ctypes.byref(dense), start, count, buffer_RI.data_ptr())
            yield start, buffer_RI[:count]

    def make_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the dense module that this one replaces."""
        module = nn.Linear(1, 1, bias=False)
        module.out_features, module.in_features = self.shape
        module.weight = nn.Parameter(self.floats.to(dtype), requires_grad=False)
        module.register_parameter("bias", self.bias)
        return module


def _count_rows(shape: tuple[int, int]) -> int:
    return max(1, reference.TILE // shape[1])


def make_float8_module(module: nn.Module, kind: str) -> Float8Module | None:
    """Make an empty module of 8-bit floats in place of a dense one; None for other kinds.

    Subclasses are not replaced, as in `make_packed_module`.
    """
    if type(module) is nn.Linear:
        shape = (module.out_features, module.in_features)
        return Float8Linear(shape, kind, bias=module.bias is not None)
    if type(module) is nn.Embedding and module.max_norm is None:
        shape = (module.num_embeddings, module.embedding_dim)
        return Float8Embedding(shape, kind, padding_idx=module.padding_idx)
    return None


def find_float8_modules(model: nn.Module) -> dict[str, Float8Module]:
    """Return the modules of 8-bit floats by name; a tied head besides its embedding."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Float8Module)}
