"""Compile for a GPU that is not here: python -m tests.unit.inference.triton_compiler BITS

Calls the backend with recorders in place of the kernels, compiles each kernel for the arguments
that it would be started with, and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cptq.inference import triton_backend as backend
from cptq.inference import triton_kernels as kernels
from tests.unit.inference.native_weights import make_weight, make_weight_in_turn

TARGET = GPUTarget("cuda", 86, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
OPTIONS = ("num_stages", "num_warps")


class Recorder:
    """Compiles a kernel instead of starting it."""

    def __init__(self, function: Any, dtype: torch.dtype) -> None:
        self.function, self.dtype = function, dtype

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.compile

    def compile(self, *values: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        parameters = self.function.params
        given = dict(zip(self.function.arg_names, values, strict=False)) | named
        types, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(parameters):
            value = given.pop(parameter.name)
            # as at a start: 1 becomes a constant, and multiples of 16 are told
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                types[parameter.name], constants[(place,)] = "constexpr", value
                continue
            is_pointer = isinstance(value, Tensor)
            types[parameter.name] = POINTERS[value.dtype] if is_pointer else "i32"
            if is_pointer or (special and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        assert not given
        source = ASTSource(
            fn=self.function, signature=types, constexprs=constants, attrs=attributes
        )
        self.report(triton.compile(source, target=TARGET, options=options))

    def report(self, compiled: Any) -> None:
        found = {
            "name": self.function.__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shared": compiled.metadata.shared,
            "tensor_cores": "mma.sync" in compiled.asm["ptx"],
        }
        print(json.dumps(found), flush=True)


class Recorders:
    """Stands for the module of kernels."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(getattr(kernels, name), self.dtype)


def compile_all(bits: int) -> None:
    types = (torch.bfloat16, torch.float16, torch.float32)
    grids = (("float16", False), ("row-bfloat16", True), ("float32", True))
    for place, dtype in enumerate(types):
        scales, symmetric = grids[(place + bits) % 3]
        group = (64, 24, 0)[bits % 3 - place]
        weight = make_weight_in_turn(
            int(scales == "row-bfloat16"),
            70,
            576,
            bits=bits,
            group=group,
            scales=scales,
            symmetric=symmetric,
            seed=bits,
        )
        backend._load_kernels = lambda dtype=dtype: Recorders(dtype)
        for tokens in (1, 5, 20, 64):
            bias = None if tokens == 5 else torch.zeros(70, dtype=dtype)
            backend.linear(torch.zeros(tokens, 576, dtype=dtype), weight, bias)
        backend.embedding(torch.tensor([3]), weight, dtype)
        backend.dequantize(weight, dtype)
    least = make_weight(1, 64, bits=bits, group=64)
    backend.linear(torch.zeros(1, 64), least, None)
    backend.linear(torch.zeros(2, 64), least, None)
    backend.dequantize(least, torch.float32)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
