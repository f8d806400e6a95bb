"""A pin to what the runtime does not take is refused, with the reason and what to do."""

from __future__ import annotations

import re

import pytest

from cptq.allocation.cost import CostModel
from cptq.config import RUNTIMES
from cptq.errors import PlanError
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Candidate
from tests.unit.allocation.synthetic import W3, W4, W16, layer, model, unit

NAME = "model.layers.0"


def cost(runtime: str) -> CostModel:
    dense = model(2, sizes=(64,))
    return CostModel(dense.units, dense.tensors, runtime=RUNTIMES[runtime])


def test_a_pin_beyond_the_runtime_is_refused() -> None:
    with pytest.raises(PlanError) as refused:
        cost("vllm").check_pinned({NAME: (W3,)})
    why = cost("vllm").refusal(NAME, W3)
    assert why
    for value in (NAME, "w3g64", why):
        assert value in refused.value.problem
    assert "--runtime" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("runtime", "row"),
    [("transformers", (W3,)), ("vllm", (W4,)), ("vllm", (W16,)), ("vllm", (W3, W4))],
)
def test_what_is_taken_or_not_pinned_passes(runtime: str, row: tuple[Candidate, ...]) -> None:
    cost(runtime).check_pinned({NAME: row})


def test_a_pin_beyond_the_format_is_refused() -> None:
    ragged = layer(f"{NAME}.x", (8, 6))
    dense = model(1).tensors
    tensor = type(dense[0])(name=ragged.weight_name, dtype="F16", shape=(8, 6))
    found = CostModel([unit(NAME, ragged)], [tensor], PACKED_LAYOUT, RUNTIMES["cptq"])
    with pytest.raises(PlanError, match=rf"{re.escape(NAME)}.*w4c-2:4.* 4 inputs"):
        found.check_pinned({NAME: (Candidate.parse("w4c-2:4"),)})
