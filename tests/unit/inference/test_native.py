"""The C kernels against float64 products of weights read bit by bit, on both ways they can run."""

from __future__ import annotations

import copy
import ctypes
import pickle
import re
import runpy
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cptq.inference import operations, reference
from cptq.inference.modules import PackedEmbedding, PackedLinear
from cptq.inference.native import backend, library
from cptq.inference.operations import PackedWeight
from tests.reference import packed_products as truth
from tests.unit.inference.native_weights import dense, make_weight, make_weight_in_turn

NATIVE = Path(library.__file__).parent
BUILT = [file for suffix in EXTENSION_SUFFIXES for file in NATIVE.glob(f"_packed{suffix}")]
needs_library = pytest.mark.skipif(not BUILT, reason="needs the C library (a C compiler)")
BITS = range(2, 9)
TOKENS = (1, 2, 3, 5, 17)
#: out, inputs and group sizes (0: per channel); rows and inputs of no round number, groups from 4
SHAPES = (
    (1, 8, (0, 4, 8)),
    (5, 33, (0, 3)),
    (18, 96, (16, 32, 48)),
    (21, 320, (64, 160, 0)),
    (17, 1280, (128, 32)),
)
#: of the largest sum of |w| |x|: float32 rounds some hundred terms
CLOSE = 2e-6


@pytest.fixture(params=["fastest", "portable"])
def path(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The library chooses its instructions once, so that each way needs a copy of the file."""
    if not BUILT:
        pytest.skip("needs the C library (a C compiler)")
    shutil.copy(BUILT[0], tmp_path / BUILT[0].name)
    monkeypatch.setenv("CPTQ_CPU", request.param)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load_library.cache_clear()
    backend.is_available.cache_clear()
    assert (library.load_library().cptq_cpu_features() == b"portable") or (
        request.param == "fastest"
    )
    yield request.param
    library.load_library.cache_clear()
    backend.is_available.cache_clear()


@pytest.fixture
def rounded() -> Iterator[None]:
    """Activations of 8 bits, as users get them; tests otherwise run with float32."""
    operations.set_exact(False)
    yield
    operations.set_exact(True)


def draw(tokens: int, inputs: int, seed: int) -> Tensor:
    """Activations with a few that are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    return x * torch.where(torch.rand(inputs, generator=generator) > 0.95, 30.0, 1.0)


def measure_error(
    y: Tensor, x: NDArray[np.float64], W: NDArray[np.float64], bias: Tensor | None
) -> float:
    """The largest difference, as a share of the sum of the terms' sizes."""
    add = 0.0 if bias is None else bias.double().numpy()
    size = np.abs(x) @ np.abs(W.T) + np.abs(add) + 1e-30
    return float((np.abs(y.double().numpy() - (x @ W.T + add)) / size).max())


def list_weights(bits: int) -> Iterator[PackedWeight]:
    """Weights of all shapes, groups, grids and types of scales, the types taken in turn."""
    types = ("float32", "float16", "bfloat16", "row", "row-bfloat16")
    seed = 0
    for out, inputs, groups in SHAPES:
        for group in groups:
            for symmetric in (True, False):
                some = types[seed % 3 : seed % 3 + 3] if symmetric else types[seed % 3 : 3]
                for scales in some:
                    seed += 1
                    yield make_weight_in_turn(
                        seed,
                        out,
                        inputs,
                        bits=bits,
                        group=group,
                        symmetric=symmetric,
                        scales=scales,
                        seed=seed,
                    )


def choose_tokens(seed: int, numbers: Sequence[int]) -> tuple[int, int]:
    """Two numbers of tokens for a weight; over the weights all have their turn."""
    return numbers[seed % len(numbers)], numbers[(seed + 2) % len(numbers)]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_what_the_bits_say(bits: int, path: str) -> None:
    for weight in list_weights(bits):
        W = torch.from_numpy(dense(weight)).float()
        assert torch.equal(backend.dequantize(weight, torch.float32), W)
        ids = torch.tensor([[weight.shape[0] - 1, 0], [0, weight.shape[0] // 2]])
        assert torch.equal(backend.embedding(ids, weight, torch.float32), W[ids])
        # products of the type are rounded once
        half = backend.embedding(ids, weight, torch.bfloat16)
        assert torch.equal(half, W[ids].bfloat16())


@pytest.mark.parametrize("bits", BITS)
def test_products_of_rounded_activations(bits: int, path: str, rounded: None) -> None:
    for seed, weight in enumerate(list_weights(bits)):
        W, (out, inputs) = dense(weight), weight.shape
        for tokens in choose_tokens(seed, TOKENS):
            x = draw(tokens, inputs, seed)
            bias = torch.randn(out) if (seed + tokens) % 2 else None
            y = backend.linear(x, weight, bias)
            assert measure_error(y, truth.round_activations(x.numpy()), W, bias) < CLOSE


@pytest.mark.parametrize("bits", BITS)
def test_exact_products(bits: int, path: str) -> None:
    for seed, weight in enumerate(list_weights(bits)):
        W, (out, inputs) = dense(weight), weight.shape
        for tokens in choose_tokens(seed, (*TOKENS, backend.DENSE_TOKENS)):
            x = draw(tokens, inputs, seed)
            bias = torch.randn(out) if (seed + tokens) % 2 else None
            y = backend.linear(x, weight, bias)
            assert measure_error(y, x.double().numpy(), W, bias) < CLOSE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 6, 130])
def test_large_products_on_threads(threads: int, tokens: int, path: str, rounded: None) -> None:
    weight = make_weight(297, 2048, bits=4, group=64, symmetric=False)
    x, before = draw(tokens, 2048, 1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = backend.linear(x, weight, None)
        W = backend.dequantize(weight, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert measure_error(y, truth.round_activations(x.numpy()), dense(weight), None) < CLOSE
    assert torch.equal(W, torch.from_numpy(dense(weight)).float())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_type_and_shape_of_the_input(dtype: torch.dtype, rounded: None) -> None:
    weight = make_weight(9, 64, bits=4, group=32)
    x = draw(6, 64, 0).to(dtype)
    bias = torch.randn(9).to(dtype)
    y = backend.linear(x.view(2, 3, 64), weight, bias)
    assert y.shape == (2, 3, 9)
    assert torch.equal(y.view(6, 9), backend.linear(x.float(), weight, bias.float()).to(dtype))
    assert backend.linear(x[:0], weight, bias).shape == (0, 9)
    assert backend.linear(x[0], weight, bias).shape == (9,)
    apart = x.repeat(1, 2)[:, ::2]  # strides of 2
    assert torch.equal(backend.linear(apart, weight, bias), backend.linear(+apart, weight, bias))
    assert backend.embedding(torch.empty(0, 2, dtype=torch.int64), weight, dtype).shape == (
        0,
        2,
        64,
    )


@pytest.mark.parametrize(
    ("bits", "levels"), [(2, ""), (4, ""), (5, ""), (8, ""), (3, "nl"), (6, "nl")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_finite_stays_so(
    bits: int, levels: str, value: float, exact: bool, path: str
) -> None:
    weight = make_weight(21, 320, bits=bits, group=64, levels=levels)
    operations.set_exact(exact)
    try:
        for tokens in (1, 3, 17):
            x = draw(tokens, 320, 0)
            x[-1, 77] = value
            y = backend.linear(x, weight, None)
            assert not y[-1].isfinite().any()
            assert bool(y[:-1].isfinite().all())
    finally:
        operations.set_exact(True)


def test_zeros_and_tiny_numbers_give_zeros(path: str, rounded: None) -> None:
    weight = make_weight(9, 96, bits=4, group=32)
    for size in (0.0, 1e-38, 1e-45):
        y = backend.linear(torch.full((2, 96), size), weight, None)
        assert float(y.abs().max()) < 1e-35
    assert float(backend.linear(torch.full((1, 96), 1e-30), weight, None).abs().max()) > 0


@needs_library
def test_wrong_inputs_are_refused() -> None:
    weight = make_weight(9, 64, bits=4, group=32)
    with pytest.raises(RuntimeError, match=r"\(2, 63\).*\(9, 64\)"):
        backend.linear(torch.ones(2, 63), weight, None)
    for ids in ([9], [0, -1]):
        with pytest.raises(IndexError, match="outside"):
            backend.embedding(torch.tensor(ids), weight, torch.float32)
    cut = make_weight(9, 64, bits=4, group=32)
    object.__setattr__(cut, "codes", cut.codes[:, :7].contiguous())
    with pytest.raises(ValueError, match="w4g32"):
        backend.linear(torch.ones(1, 64), cut, None)


@needs_library
def test_weights_that_it_does_not_take() -> None:
    weight = make_weight(9, 64, bits=4, group=32)
    assert operations.find_backend(weight, torch.float32).name == "native"
    assert operations.find_backend(weight, torch.float64).name == "reference"
    object.__setattr__(weight, "mask", torch.zeros(9, 2, dtype=torch.int32))
    assert operations.find_backend(weight, torch.float32).name == "reference"


@needs_library
def test_gradients_flow_through_the_reference(rounded: None) -> None:
    weight = make_weight(9, 64, bits=4, group=32)
    x = draw(3, 64, 0).requires_grad_()
    backend.linear(x, weight, None).sum().backward()
    assert x.grad is not None
    expected = torch.from_numpy(dense(weight)).float().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        assert not backend.linear(x, weight, None).requires_grad


def fill(module: PackedLinear | PackedEmbedding, weight: PackedWeight) -> None:
    module.weight.data, module.weight_scale.data = weight.codes, weight.scale


@needs_library
def test_modules_notice_that_their_memory_changed() -> None:
    weights = [make_weight(9, 64, bits=4, group=32, seed=seed) for seed in (0, 1)]
    module, x = PackedLinear((9, 64), weights[0].scheme, bias=False), draw(2, 64, 0)
    for weight in weights:
        fill(module, weight)
        assert module.packed is module.packed
        torch.testing.assert_close(module(x), reference.linear(x, weight, None))
    module.to(torch.bfloat16)
    half = reference.linear(x, module.packed, None)
    torch.testing.assert_close(module(x), half)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert other.packed.codes is not module.packed.codes


def test_a_library_that_is_missing_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load_library.cache_clear()
    backend.is_available.cache_clear()
    try:
        weight, x = make_weight(9, 64, bits=4, group=32), draw(2, 64, 0)
        with pytest.warns(RuntimeWarning, match=r"was not built.*pip install") as told:
            y = operations.linear(x, weight, None)
        assert len(told) == 1
        assert torch.equal(y, reference.linear(x, weight, None))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            operations.linear(x, weight, None)
        (tmp_path / f"_packed{EXTENSION_SUFFIXES[-1]}").write_text("no library")
        library.load_library.cache_clear()
        with pytest.raises(library.LibraryError, match="cannot be loaded"):
            library.load_library()
    finally:
        library.load_library.cache_clear()
        backend.is_available.cache_clear()


def test_another_version_of_the_library_is_refused(path: str, monkeypatch: Any) -> None:
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "ABI_VERSION", -1)
    with pytest.raises(library.LibraryError, match="another version"):
        library.load_library()


def test_constants_are_those_of_the_header() -> None:
    header = (NATIVE / "packed.h").read_text(encoding="utf-8")
    known = {name: int(value) for name, value in re.findall(r"(CPTQ_\w+) ?=? (-?\d+)", header)}
    assert known["CPTQ_ABI_VERSION"] == library.ABI_VERSION
    assert known["CPTQ_ROW_CODES"] == library.ROW_CODES
    assert [known[f"CPTQ_{name}"] for name in ("F32", "F16", "BF16")] == list(
        library.TYPES.values()
    )
    assert known["CPTQ_EMEMORY"] == library.NO_MEMORY
    assert known["CPTQ_EINDEX"] == library.NO_SUCH_ROW
    fields = re.search(r"typedef struct \{(.*?)\} cptq_weight", header, flags=re.DOTALL)
    assert fields is not None
    code = re.sub(r"/\*.*?\*/", "", fields[1], flags=re.DOTALL)
    names = re.findall(r"(\w+)(?=[,;])", code)
    assert [name.replace("in", "inputs") if name == "in" else name for name in names] == [
        field[0] for field in library.WeightStruct._fields_
    ]
    assert ctypes.sizeof(library.WeightStruct) == 88


@pytest.mark.parametrize(("value", "answer"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_exact_products(
    value: str, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPTQ_EXACT", value)
    again = runpy.run_path(str(operations.__file__), run_name="operations_again")
    assert again["_exact"] is answer


def test_exact_products_end_with_their_block(rounded: None) -> None:
    with operations.exact_products():
        assert operations.is_exact()
    assert not operations.is_exact()
