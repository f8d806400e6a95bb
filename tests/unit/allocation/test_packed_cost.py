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
from cptq.config import RUNTIMES
from cptq.errors import PlanError
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import Budget, Candidate
from tests.unit.allocation.synthetic import packed_model

LABELS = ("w2g16", "w3g16-asym", "w4c", "w4g16-s50", "w5c-asym", "w8g16", "w8c-asym-s37", "w16")
LABELS += ("w4g16-row", "w8g16-row-2:4")
CANDIDATES = tuple(map(Candidate.parse, LABELS))


def choose(draw: random.Random, cost: CostModel) -> dict[str, Candidate]:
    """A plan; the embedding is never sparse."""
    plain = [candidate for candidate in CANDIDATES if not candidate.sparsity]
    return {
        unit.name: draw.choice(plain if unit.block is None else CANDIDATES) for unit in cost.units
    }


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_counts_what_the_library_writes(seed: int, vocabulary: bool) -> None:
    cost, draw = packed_model(9, seed=seed, vocabulary=vocabulary), random.Random(seed)
    plan = choose(draw, cost)
    tensors = [
        spec for unit in cost.units for spec in cost.list_unit_tensors(unit.name, plan[unit.name])
    ]
    mine = {layer.weight_name for unit in cost.units for layer in unit.layers}
    tensors += [spec for spec in cost.tensors if spec.name not in mine]
    made = {s.name: torch.zeros(s.shape, dtype=TORCH_DTYPES[s.dtype]) for s in tensors}
    assert cost.file_bytes(plan) == len(save(made, {"format": "pt"}))


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_bounds_the_file_from_both_sides(seed: int, vocabulary: bool) -> None:
    """Dense and packed weights share a name and lie in different places of the file."""
    cost, draw = packed_model(9, seed=seed, vocabulary=vocabulary), random.Random(seed)
    ledger = build_ledger(Budget(limit_bytes=0, asked=""), cost, CANDIDATES)
    for _ in range(50):
        plan = choose(draw, cost)
        plan = {u: c if c in ledger.bytes_of[u] else Candidate(bits=16) for u, c in plan.items()}
        assert (
            ledger.sum_bytes(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.sum_bytes(plan)
        )


@pytest.mark.parametrize(("bits", "label"), [(2, "w3g16"), (4, "w4g16"), (8, "w8g16"), (16, "w16")])
def test_a_uniform_model_has_its_vocabulary_at_the_nearest_width(bits: int, label: str) -> None:
    cost = packed_model(9, vocabulary=True)
    uniform = Candidate(bits=bits, group_size=0 if bits == 16 else 16)
    plan = {unit.name: uniform for unit in cost.units} | {"model.embed": Candidate.parse(label)}
    assert cost.count_uniform_bytes(uniform) == cost.file_bytes(plan)


@pytest.mark.parametrize(
    ("runtime", "bits", "label"),
    [("transformers", 4, "f8e4m3"), ("transformers", 16, "w16"), ("vllm", 4, "w16")],
)
def test_a_uniform_model_has_its_vocabulary_in_8_bit_floats_where_they_alone_are_taken(
    runtime: str, bits: int, label: str
) -> None:
    packed = packed_model(9, vocabulary=True)
    cost = CostModel(packed.units, packed.tensors, PACK_QUANTIZED, RUNTIMES[runtime])
    uniform = Candidate(bits=bits, group_size=0 if bits == 16 else 32)
    plan = {
        unit.name: uniform for unit in cost.units if not cost.explain_refusal(unit.name, uniform)
    }
    plan["model.embed"] = Candidate.parse(label)
    assert cost.count_uniform_bytes(uniform) == cost.file_bytes(plan)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    cost = packed_model(9)
    unit = cost.units[0]
    odd = replace(unit.layers[0], shape=(7, 7))
    cost = CostModel([replace(unit, layers=(odd,))], cost.tensors, cost.layout, cost.runtime)
    with pytest.raises(PlanError, match=r"w4c-2:4.* 7"):
        cost.list_unit_tensors(unit.name, Candidate.parse("w4c-2:4"))
