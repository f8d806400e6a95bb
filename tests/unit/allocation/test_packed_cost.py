"""Bytes of the packed format: exact for the file, and bounded by the sums that searches use."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import build_ledger
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import PlanError
from cptq.layouts.packed import packed_specs
from cptq.types import Budget, Candidate
from tests.unit.allocation.synthetic import packed_model

LABELS = ("w2g16", "w3g16-asym", "w4c", "w4g16-s50", "w5c-asym", "w8g16", "w8c-asym-s37", "w16")
CANDIDATES = tuple(map(Candidate.parse, LABELS))


def packed(seed: int = 0, *, embedding: str | None = None) -> CostModel:
    fixed = {}
    if embedding is not None:
        specs = packed_specs("model.embed", (97, 48), "F16", Candidate.parse(embedding))
        fixed = {"model.embed.weight": specs}
    return packed_model(9, seed=seed, fixed=fixed)


@pytest.mark.parametrize("embedding", [None, "w8g16", "w6c-asym"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_what_the_library_writes(seed: int, embedding: str | None) -> None:
    cost, draw = packed(seed, embedding=embedding), random.Random(seed)
    plan = {unit.name: draw.choice(CANDIDATES) for unit in cost.units}
    tensors = [
        spec for unit in cost.units for spec in cost.unit_tensors(unit.name, plan[unit.name])
    ]
    mine = {layer.weight_name for unit in cost.units for layer in unit.layers}
    tensors += [s for s in cost.tensors if s.name not in mine and s.name != "model.embed.weight"]
    shape = (97, 48)
    tensors += (
        packed_specs("model.embed", shape, "F16", Candidate.parse(embedding))
        if embedding
        else cost.tensors[:1]
    )
    made = {s.name: torch.zeros(s.shape, dtype=TORCH_DTYPES[s.dtype]) for s in tensors}
    assert cost.file_bytes(plan) == len(save(made, {"format": "pt"}))


@pytest.mark.parametrize("embedding", [None, "w8g16"])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_bounds_the_file_from_both_sides(seed: int, embedding: str | None) -> None:
    """Dense and packed weights share a name and lie in different places of the file."""
    cost, draw = packed(seed, embedding=embedding), random.Random(seed)
    ledger = build_ledger(Budget(limit_bytes=0, asked=""), cost, CANDIDATES)
    for _ in range(50):
        plan = {unit.name: draw.choice(CANDIDATES) for unit in cost.units}
        assert (
            ledger.sum_bytes(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.sum_bytes(plan)
        )


def test_a_smaller_embedding_is_a_smaller_file() -> None:
    plain, small = packed(), packed(embedding="w6c")
    assert small.dense_bytes < plain.dense_bytes
    assert small.dense_file_bytes == plain.dense_file_bytes
    assert small.weight_bytes({}) == plain.weight_bytes({})


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    cost = packed()
    unit = cost.units[0]
    odd = replace(unit.layers[0], shape=(7, 7))
    cost = CostModel([replace(unit, layers=(odd,))], cost.tensors, cost.layout, cost.runtime)
    with pytest.raises(PlanError, match=r"w4c-2:4.* 7"):
        cost.unit_tensors(unit.name, Candidate.parse("w4c-2:4"))
