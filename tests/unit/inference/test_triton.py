"""Triton's kernels against float64 products of weights read bit by bit, in Triton's interpreter.

With TRITON_INTERPRET=0 on a machine with a GPU the same tests run there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cptq.inference import operations, reference
from cptq.inference import triton_backend as backend
from cptq.inference.modules import PackedEmbedding, PackedLinear
from cptq.inference.operations import PackedWeight
from tests.unit.inference import triton_interpreter
from tests.unit.inference.native_weights import dense, make_weight, make_weight_in_turn

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason='needs triton (pip install "cptq[gpu]")'
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BITS = range(2, 9)
TOKENS = (1, 3, 16, 17, 40)
TYPES = ("float32", "float16", "bfloat16", "row", "row-bfloat16")
#: out, inputs, group (0: per channel): blocks with tails, groups that chunks do not fill
SHAPES = ((37, 96, 32), (18, 80, 16), (5, 33, 0), (70, 320, 160), (21, 384, 128), (9, 72, 24))
LARGER = ((3, 45, 3), (67, 520, 0), (65, 512, 64))
#: of the largest sum of |w| |x|: float32 rounds some hundred terms
CLOSE = 2e-6
#: bytes that a block may use on GPUs of compute capability 8.6 and 8.9
SHARED_MEMORY = 99 << 10
CLOSE_TO_TORCH = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
#: half a unit of the last place
ROUNDED = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    """bfloat16 in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and find_spec("triton"):
            triton_interpreter.mend(patch)
        yield


def move(weight: PackedWeight) -> PackedWeight:
    """The weight on the device of the tests."""
    for part in ("codes", "scale", "factor", "zero"):
        tensor = getattr(weight, part)
        object.__setattr__(weight, part, None if tensor is None else tensor.to(DEVICE))
    return weight


def check(weight: PackedWeight, tokens: int, dtype: torch.dtype, *, bias: bool) -> None:
    """Products equal float64 ones but for float32 sums and one rounding."""
    W, (out, inputs) = dense(weight), weight.shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    add = torch.randn(out, generator=generator).to(dtype) if bias else None
    y = backend.linear(x.to(DEVICE), move(weight), None if add is None else add.to(DEVICE))
    assert y.dtype is dtype
    b = 0.0 if add is None else add.double().numpy()
    true = x.double().numpy() @ W.T + b
    size = np.abs(x.double().numpy()) @ np.abs(W.T) + np.abs(b) + 1e-30
    error = np.abs(y.cpu().double().numpy() - true) - ROUNDED[dtype] * np.abs(true)
    unpacked = tokens > max(1, backend._find_shape(weight).most_tokens)
    # torch multiplies weights that are rounded to the type of x
    assert float((error / size).max()) < CLOSE + unpacked * ROUNDED[dtype]


def list_cases(bits: int) -> Iterator[tuple[PackedWeight, torch.dtype]]:
    """Weights of every third shape; scales, grids and types of x are taken in turn."""
    for number, (out, inputs, group) in enumerate(SHAPES[bits % 3 :: 3]):
        seed = bits + number
        symmetric = bool(seed % 3)
        scales = TYPES[seed % 5] if symmetric else TYPES[seed % 3]
        weight = make_weight_in_turn(
            seed // 3,
            out,
            inputs,
            bits=bits,
            group=group,
            symmetric=symmetric,
            scales=scales,
            seed=seed,
        )
        yield weight, (torch.float32, torch.float16, torch.bfloat16)[seed % 3 - bits % 3]


@needs_triton
@pytest.mark.parametrize("bits", BITS)
def test_products(bits: int) -> None:
    for number, (weight, dtype) in enumerate(list_cases(bits)):
        for tokens in TOKENS[(number + bits) % 2 :: 2]:
            check(weight, tokens, dtype, bias=bool((number + tokens) % 2))


@needs_triton
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_what_the_bits_say(bits: int) -> None:
    for weight, dtype in list_cases(bits):
        W = torch.from_numpy(dense(weight)).float().to(dtype)
        move(weight)
        assert torch.equal(backend.dequantize(weight, dtype).cpu(), W)
        ids = torch.tensor([[weight.shape[0] - 1, 0], [0, weight.shape[0] // 2]])
        assert torch.equal(backend.embedding(ids.to(DEVICE), weight, dtype).cpu(), W[ids])


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scales", [*TYPES, *(f"{name}-asym" for name in TYPES[:3])])
def test_all_products(bits: int, scales: str) -> None:
    """Every shape and number of tokens; the types of x are taken in turn."""
    stored = scales.removesuffix("-asym")
    for number, (out, inputs, group) in enumerate((*SHAPES, *LARGER)):
        symmetric = stored == scales
        weight = make_weight_in_turn(
            number,
            out,
            inputs,
            bits=bits,
            group=group,
            symmetric=symmetric,
            scales=stored,
        )
        for place, tokens in enumerate(TOKENS):
            dtype = list(ROUNDED)[(bits + number + place) % 3]
            check(weight, tokens, dtype, bias=tokens != 3)


@needs_triton
@pytest.mark.parametrize("bits", [3, 4])
def test_sums_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of parts gives the same product, also where the last is shorter."""
    weight = make_weight(21, 704, bits=bits, group=64, symmetric=False)
    used = set()
    for parts in (1, 2, 3, 11):
        monkeypatch.setattr(backend, "PROGRAMS", 100)
        monkeypatch.setattr(backend, "PARTS", parts)
        used.add(backend._split(11, 1, 4))
        check(weight, 5, torch.float32, bias=True)
    assert len(used) == 4


def test_parts_cover_all_chunks() -> None:
    for chunks in range(1, 40):
        for programs in (1, 7, 1000):
            parts, span = backend._split(chunks, programs, 16)
            assert (parts - 1) * span < chunks <= parts * span
            assert parts == 1 or parts * programs <= backend.PROGRAMS * 16


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDED)
def test_many_tokens_are_multiplied_by_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MOST_TOKENS", (4, 4))
    monkeypatch.setattr(backend, "TILE", 1000)  # 10 rows of 37
    weight = move(make_weight(37, 96, bits=3, group=32))
    x, bias = torch.randn(2, 3, 96).to(DEVICE, dtype), torch.randn(37).to(DEVICE, dtype)
    y = backend.linear(x, weight, bias)
    assert y.shape == (2, 3, 37)
    # a CPU adds the bias to a product that is rounded already
    torch.testing.assert_close(
        y, reference.linear(x, weight, bias), atol=CLOSE_TO_TORCH[dtype], rtol=0
    )


@needs_triton
def test_shapes_and_strides_of_inputs() -> None:
    weight = move(make_weight(9, 64, bits=4, group=32))
    x, bias = torch.randn(6, 64, device=DEVICE), torch.randn(9, device=DEVICE)
    y = backend.linear(x, weight, bias)
    assert torch.equal(backend.linear(x.view(2, 3, 64), weight, bias), y.view(2, 3, 9))
    assert backend.linear(x[:0], weight, bias).shape == (0, 9)
    assert backend.linear(x[0], weight, bias).shape == (9,)
    apart = x.repeat(1, 2)[:, ::2]  # strides of 2
    assert torch.equal(backend.linear(apart, weight, bias), backend.linear(+apart, weight, bias))
    none = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert backend.embedding(none, weight, torch.float32).shape == (0, 2, 64)


@needs_triton
def test_what_is_not_finite_stays_so() -> None:
    weight = move(make_weight(21, 320, bits=5, group=64))
    for tokens in (1, 3):
        x = torch.randn(tokens, 320, device=DEVICE)
        x[-1, 77] = float("nan")
        y = backend.linear(x, weight, None)
        assert not y[-1].isfinite().any()
        assert bool(y[:-1].isfinite().all())


@needs_triton
def test_modules_compute_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = replace(backend.BACKEND, supports=lambda packed, dtype: True)
    monkeypatch.setattr(backend, "ANYWHERE", anywhere, raising=False)
    entries = {"triton": "cptq.inference.triton_backend:ANYWHERE"}
    monkeypatch.setattr(operations.BACKENDS, "_entries", entries)
    weight = make_weight(9, 64, bits=4, group=32)
    linear = PackedLinear((9, 64), weight.scheme, bias=True)
    embedding = PackedEmbedding((9, 64), weight.scheme)
    for module in (linear, embedding):
        module.weight.data, module.weight_scale.data = weight.codes, weight.scale
        module.to(device=DEVICE, dtype=torch.float32)
    x, ids = torch.randn(2, 3, 64, device=DEVICE), torch.tensor([[3, 0]], device=DEVICE)
    torch.testing.assert_close(linear(x), reference.linear(x, linear.packed, linear.bias))
    assert torch.equal(embedding(ids), linear.dequantize(torch.float32)[ids])
    assert linear.packed.prepared["triton"] is backend._find_shape(linear.packed)


@needs_triton
def test_rows_that_do_not_exist_are_nan() -> None:
    weight = move(make_weight(9, 64, bits=3, group=32))
    rows = backend.embedding(torch.tensor([9, 8, -1], device=DEVICE), weight, torch.float16)
    assert rows.isnan().all(1).tolist() == [True, False, True]
    assert bool(rows[1].isfinite().all())


@needs_triton
def test_gradients_flow_through_the_reference() -> None:
    weight = move(make_weight(9, 64, bits=4, group=32))
    x = torch.randn(3, 64, device=DEVICE).requires_grad_()
    backend.linear(x, weight, None).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not backend.linear(x, weight, None).requires_grad


def test_wrong_inputs_are_refused() -> None:
    weight = make_weight(9, 64, bits=4, group=32)
    with pytest.raises(RuntimeError, match=r"\(2, 63\).*\(9, 64\)"):
        backend.linear(torch.ones(2, 63), weight, None)
    object.__setattr__(weight, "codes", weight.codes[:, :7].contiguous())
    with pytest.raises(ValueError, match="w4g32"):
        backend._find_shape(weight)


@pytest.mark.parametrize(
    ("group", "unit", "chunk"),
    [(16, 8, 16), (16, 32, 0), (32, 32, 32), (64, 4, 64), (96, 16, 32), (24, 8, 0), (1537, 32, 64)],
)
def test_chunks_are_whole_units_and_divide_groups(group: int, unit: int, chunk: int) -> None:
    assert backend.choose_chunk(group, 1537, unit) == chunk


@needs_triton
def test_a_kept_start_is_used_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a start returns the compiled kernel."""
    started: list[tuple[object, ...]] = []
    kernels = backend._load_kernels()
    run = kernels.multiply_one

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            def start(*values: Any) -> None:
                started.append(values)
                run[grid](*values)

            return start

    class Start:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
            return lambda *values, num_warps, **named: run[grid](*values, **named) or Compiled()

    monkeypatch.setattr(kernels, "multiply_one", Start())
    weight = move(make_weight(9, 64, bits=4, group=32))
    x = torch.randn(3, 64, device=DEVICE)
    for number, row in enumerate(x):
        y = backend.linear(row, weight, None)
        torch.testing.assert_close(y, reference.linear(row, weight, None))
        assert len(started) == number
    backend.linear(x[0].to(torch.bfloat16), weight, None)
    shifted = torch.zeros(65, device=DEVICE)[1:]
    backend.linear(shifted, weight, None)
    assert len(started) == 2  # another type, another alignment


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("bits", BITS)
def test_kernels_compile(bits: int, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does, which needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.unit.inference.triton_compiler", str(bits)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"multiply_one", "multiply_many", "add_parts", "write_rows"}
    assert {kernel["name"] for kernel in found} == names
    for kernel in found:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        tensor_cores = kernel["name"] == "multiply_many" and kernel["dtype"] != "float32"
        assert kernel["tensor_cores"] == tensor_cores, kernel


class _OnGpu:
    """Stands for a weight's codes on a GPU that is not here."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda:0")


@pytest.fixture
def far_weight(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackedWeight]:
    """A weight that claims to be on a recent GPU."""
    weight = make_weight(9, 64, bits=4, group=32)
    object.__setattr__(weight, "codes", _OnGpu())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend.is_available.cache_clear()
    yield weight
    backend.is_available.cache_clear()


@needs_triton
def test_weights_that_it_takes(far_weight: PackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in backend.TYPES:
        assert operations.find_backend(far_weight, dtype).name == "triton"
    assert operations.find_backend(far_weight, torch.float64).name == "reference"
    near = make_weight(9, 64, bits=4, group=32)
    assert not backend.supports(near, torch.float32)
    object.__setattr__(far_weight, "mask", torch.zeros(9, 2, dtype=torch.int32))
    assert operations.find_backend(far_weight, torch.float32).name == "reference"
    object.__setattr__(far_weight, "mask", None)
    backend.is_available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"cuda:0.*slowly.*8\.0"):
        assert operations.find_backend(far_weight, torch.float32).name == "reference"


def test_without_triton_the_reference_computes_and_it_is_told_once(
    far_weight: PackedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "cptq.inference.triton_kernels", raising=False)
    monkeypatch.delattr("cptq.inference.triton_kernels", raising=False)
    with pytest.warns(RuntimeWarning, match=r"triton is missing.*cptq\[gpu\]") as told:
        assert operations.find_backend(far_weight, torch.float16) is reference.BACKEND
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operations.find_backend(far_weight, torch.bfloat16) is reference.BACKEND
