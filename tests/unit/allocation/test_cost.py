from __future__ import annotations

import random
import re

import pytest
import torch
from safetensors.torch import save

from cptq.allocation.cost import CostModel, list_layer_tensors
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import PlanError
from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, TensorSpec
from tests.unit.allocation.synthetic import CANDIDATES, layer, model, unit

W4 = Candidate(bits=4, group_size=64)
DENSE = Candidate(bits=16)


def file_of(cost: CostModel, choices: dict[str, Candidate]) -> bytes:
    """The file that the safetensors library writes for a choice."""
    specs = {spec.name: spec for spec in cost.tensors}
    for u in cost.units:
        for x in u.layers:
            del specs[x.weight_name]
        specs |= {spec.name: spec for spec in cost.list_unit_tensors(u.name, choices[u.name])}
    tensors = {n: torch.zeros(s.shape).to(TORCH_DTYPES[s.dtype]) for n, s in specs.items()}
    return save(tensors, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("seed", range(4))
def test_file_bytes_are_those_of_the_library(dtype: str, seed: int) -> None:
    cost, draw = model(7, dtype=dtype, seed=seed), random.Random(seed)
    choices = {u.name: draw.choice(CANDIDATES) for u in cost.units}
    assert cost.file_bytes(choices) == len(file_of(cost, choices))


def test_tensors_of_a_layer() -> None:
    specs = list_layer_tensors(layer("a", (5, 96), "BF16"), Candidate(bits=3, group_size=32))
    assert [(s.name, s.dtype, s.shape) for s in specs] == [
        ("a.weight_packed", "I32", (5, 9)),
        ("a.weight_scale", "BF16", (5, 3)),
        ("a.weight_shape", "I64", (2,)),
    ]


@pytest.mark.parametrize("inputs", [7, 48, 130, 192])
@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_odd_inputs_and_resolved_groups(inputs: int, bits: int) -> None:
    packed, scale, _ = list_layer_tensors(
        layer("a", (3, inputs)), Candidate(bits=bits, group_size=64)
    )
    assert packed.shape == (3, -(-inputs * bits // 32))
    assert scale.shape == (3, inputs // resolve_group(inputs, 64))


def test_a_unit_without_a_choice_is_dense() -> None:
    cost = model(3)
    assert cost.file_bytes({}) == cost.count_uniform_bytes(DENSE) == cost.dense_bytes


def test_unit_bytes_of_a_fused_unit_are_those_of_its_layers() -> None:
    cost = model(3)
    expected = sum(s.nbytes for x in cost.units[2].layers for s in list_layer_tensors(x, W4))
    assert len(cost.units[2].layers) == 2
    assert cost.count_unit_bytes(cost.units[2].name, W4) == expected


def test_size_report() -> None:
    x = layer("a", (64, 128))
    y = layer("b", (64, 128))
    rest = TensorSpec(name="norm", dtype="F32", shape=(128,))
    tensors = [TensorSpec(name=z.weight_name, dtype="F16", shape=z.shape) for z in (x, y)]
    cost = CostModel([unit("a", x), unit("b", y)], [*tensors, rest])
    report = cost.make_size_report({"a": W4, "b": DENSE})
    assert report.nominal_bits == 10
    # 4 bits of codes, 16 bits of scale per 64 weights, 16 bytes of shape; and 16 bits
    assert report.effective_bits == (4 + 16 / 64 + 8 * 16 / x.numel + 16) / 2
    assert report.file_bytes == cost.file_bytes({"a": W4}) == report.count_bytes("file")
    assert (
        report.compressible_bytes == cost.weight_bytes({"a": W4}) == report.count_bytes("weights")
    )
    assert report.compressible_bytes == report.effective_bits * 2 * x.numel / 8
    assert report.file_bits == 8 * report.file_bytes / (2 * x.numel + 128)
    halved = [*tensors, TensorSpec(name="norm", dtype="F16", shape=(128,))]
    assert report.dense_file_bytes == CostModel([], halved).dense_bytes


def test_size_report_without_units() -> None:
    report = CostModel([], [TensorSpec(name="a", dtype="F16", shape=(4,))]).make_size_report({})
    assert (report.nominal_bits, report.effective_bits) == (0, 0)


def test_a_file_above_the_shard_size_is_counted_by_shards() -> None:
    one = model(6)
    several = CostModel(one.units, one.tensors, shard_bytes=30_000)
    assert several.file_bytes({}) > one.file_bytes({})
    assert several.dense_file_bytes == one.dense_file_bytes


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(bits=4, symmetric=False),
        Candidate(bits=4, sparsity=0.5, pattern="unstructured"),
        Candidate(bits=9),
        Candidate(bits=1),
    ],
)
def test_what_the_format_cannot_hold_is_refused(candidate: Candidate) -> None:
    with pytest.raises(PlanError, match=re.escape(candidate.label)):
        model(2).file_bytes({"model.layers.0": candidate})


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(PlanError, match=r"'nope'.*allowed: .*model\.layers\.0"):
        model(2).file_bytes({"nope": W4})


def test_a_unit_without_its_tensor_is_refused() -> None:
    with pytest.raises(PlanError, match=r"a\.weight"):
        CostModel([unit("a", layer("a", (2, 2)))], [])
