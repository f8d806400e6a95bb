"""Mend what Triton's interpreter, built on NumPy, computes otherwise than a GPU in bfloat16.

`tl.dot` multiplies the bits of bfloat16 as integers, and float32 is cut off instead of rounded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def mend(patch: pytest.MonkeyPatch) -> None:
    """Convert operands of products to float32 first, and round as GPUs and torch do."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widen(self: Any, value: Any) -> Any:
        is_bfloat16 = value.dtype.scalar == tl.bfloat16
        return plain_cast(self, value, tl.float32) if is_bfloat16 else value

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widen(self, a), widen(self, b), *rest)

    def cast(self: Any, value: Any, dtype: Any) -> Any:
        if (value.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, value, dtype)
        rounded = torch.as_tensor(value.data).bfloat16().view(torch.uint16).numpy()
        return handle(rounded, dtype.scalar)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "cast_impl", cast)
