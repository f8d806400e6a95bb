"""The operations against weights read one bit at a time, for any tile size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cptq.artifact.formats.packed import PACKED
from cptq.inference import operations, reference
from cptq.inference.modules import PackedEmbedding, PackedLinear, PackedModule, make_packed_module
from cptq.inference.operations import PackedWeight
from cptq.layouts.packed import resolve_candidate
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, CompressedLayer, LayerSpec
from tests.quick import cover
from tests.reference import packed as truth
from tests.unit.artifact.packed_builders import mask_of
from tests.unit.compression.test_gptq_grids import problem

LABELS = ("w2c", "w3g8", "w4g8-asym", "w5c-asym", "w8g4", "w4g8-s50", "w3c-asym-s70", "w6g4-2:4")
LABELS += ("w2c-asym-2:4", "w7g8", "w4g8-row", "w8g4-row", "w3g8-row-s50", "w5g4-row-2:4")
SHAPES = [(1, 8), (7, 24), (33, 40)]


def compressed(out: int, inputs: int, label: str) -> CompressedLayer:
    """A random layer."""
    from cptq.compression import nearest
    from cptq.compression.layer import compress_layer

    choice = resolve_candidate(Candidate.parse(label), inputs)
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(out, inputs), dtype="F32")
    asked = problem(out, inputs, inputs, 4)
    return compress_layer(
        spec, asked.W_OI.float(), asked.H_II.float(), choice, nearest.compress, PACKED.layout
    )


def tensors_of(layer: CompressedLayer) -> dict[str, Tensor]:
    """The tensors that are written, by the last part of their names."""
    specs = PACKED.list_layer_tensors(layer)
    return {s.name.rpartition(".")[2]: PACKED.pack_layer_tensor(layer, s) for s in specs}


def module_of(layer: CompressedLayer, kind: type[PackedModule]) -> Any:
    module = (
        PackedLinear(layer.spec.shape, layer.result.candidate, bias=True)
        if kind is PackedLinear
        else PackedEmbedding(layer.spec.shape, layer.result.candidate)
    )
    module.load_state_dict(tensors_of(layer), strict=False)
    return module


@pytest.mark.parametrize(("label", "shape", "tile"), cover(LABELS, SHAPES, [1, 100, 1 << 20]))
def test_every_weight_is_where_its_bits_say(
    label: str, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = shape
    monkeypatch.setattr(reference, "TILE", tile)
    layer = compressed(out, inputs, label)
    choice = layer.result.candidate
    lists = {name: tensor.tolist() for name, tensor in tensors_of(layer).items()}
    expected = torch.tensor(
        truth.dense(
            lists, out, inputs, choice.bits, pattern=choice.pattern, group=choice.group_size
        ),
        dtype=torch.float64,
    )
    module = module_of(layer, PackedLinear)
    weight = module.packed
    assert torch.equal(operations.dequantize(weight, torch.float64), expected)
    assert torch.equal(dequantize_layer(layer, torch.float64), expected)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(out, generator=generator, dtype=torch.float64)
    y = operations.linear(x, weight, bias)
    torch.testing.assert_close(y, x @ expected.T + bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operations.linear(x, weight, None), x @ expected.T)
    if not choice.sparsity:
        ids = torch.tensor([[0, out - 1], [out // 2, 0]])
        assert torch.equal(operations.embedding(ids, weight, torch.float64), expected[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_type_of_the_input(dtype: torch.dtype) -> None:
    layer = compressed(7, 24, "w4g8-asym")
    linear, embedding = module_of(layer, PackedLinear), module_of(layer, PackedEmbedding)
    assert linear.to(dtype)(torch.ones(1, 24, dtype=dtype)).dtype is dtype
    assert linear.weight.dtype is torch.int32
    assert embedding.to(dtype)(torch.tensor([1])).dtype is dtype


def test_rows_behind_a_bitmask_are_not_looked_up() -> None:
    layer = compressed(7, 24, "w4g8-s50")
    with pytest.raises(ValueError, match="bitmask"):
        operations.embedding(
            torch.tensor([0]), module_of(layer, PackedLinear).packed, torch.float32
        )


def test_a_weight_keeps_its_tensors_packed() -> None:
    layer = compressed(33, 40, "w4g8-asym")
    module = module_of(layer, PackedLinear)
    module.load_state_dict(
        tensors_of(layer), strict=False, assign=True
    )  # scales as they are stored
    weight = module.packed
    assert weight.nbytes == layer.result.nbytes
    x = torch.randn(5, 40)
    before = {name: tensor.clone() for name, tensor in tensors_of(layer).items()}
    operations.linear(x, weight, None)
    assert torch.equal(weight.codes, before["weight"])
    assert weight.nbytes == layer.result.nbytes


def test_packed_modules_stand_for_plain_ones_alone() -> None:
    scheme, sparse = Candidate.parse("w4c"), Candidate.parse("w4c-s50")
    linear, conv = (
        make_packed_module(nn.Linear(8, 3), scheme),
        make_packed_module(Conv1D(3, 8), scheme),
    )
    assert isinstance(linear, PackedLinear)
    assert isinstance(conv, PackedLinear)
    assert linear.shape == conv.shape == (3, 8)
    assert conv.transposed
    assert isinstance(make_packed_module(nn.Embedding(9, 8), scheme), PackedEmbedding)
    assert make_packed_module(nn.Embedding(9, 8), sparse) is None
    assert make_packed_module(nn.Embedding(9, 8, max_norm=1.0), scheme) is None
    assert make_packed_module(nn.LayerNorm(8), scheme) is None
    assert make_packed_module(type("Scaled", (nn.Embedding,), {})(9, 8), scheme) is None
    assert "w4c" in repr(linear)


def test_dense_modules_compute_the_same() -> None:
    layer = compressed(7, 24, "w4g8-asym")
    for kind, x in ((PackedLinear, torch.randn(2, 24)), (PackedEmbedding, torch.tensor([3, 0]))):
        module = module_of(layer, kind)
        # two backends may sum in another order
        torch.testing.assert_close(module.make_dense(torch.float32)(x), module(x))


def test_backends_are_asked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam for fast kernels: one entry, and `supports` decides."""
    weight = module_of(compressed(7, 24, "w4c"), PackedLinear).packed

    def doubled(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        return 2 * reference.linear(x, packed, bias)

    fast = operations.Backend(
        name="fast",
        supports=lambda packed, dtype: packed.scheme.bits == 4 and dtype is torch.float32,
        linear=doubled,
        embedding=reference.embedding,
        dequantize=reference.dequantize,
    )
    monkeypatch.setattr(reference, "FAST", fast, raising=False)
    entries = {"fast": "cptq.inference.reference:FAST", **operations.BACKENDS._entries}
    monkeypatch.setattr(operations.BACKENDS, "_entries", entries)
    x = torch.randn(2, 24)
    assert operations.find_backend(weight, torch.float32) is fast
    assert torch.equal(operations.linear(x, weight, None), 2 * reference.linear(x, weight, None))
    assert operations.find_backend(weight, torch.float64).name == "reference"
    with pytest.raises(LookupError, match=r"w4c.*torch\.int32"):
        operations.find_backend(weight, torch.int32)


def test_masks_of_the_helper_are_masks() -> None:
    mask = mask_of(torch.randn(3, 8), Candidate.parse("w4c-2:4"))
    assert mask is not None
    assert bool((mask.view(-1, 4).sum(1) == 2).all())
