"""A pin to what the runtime does not take is refused, with the reason and what to do."""

from __future__ import annotations

import pytest

from cptq.allocation.cost import CostModel
from cptq.config import RUNTIMES
from cptq.errors import PlanError
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Candidate
from tests.unit.allocation.synthetic import layer, model, unit

W3, W4, W16 = (Candidate.parse(label) for label in ("w3g64", "w4g64", "w16"))
NAME = "model.layers.0"


def cost(runtime: str) -> CostModel:
    dense = model(2, sizes=(64,))
    return CostModel(dense.units, dense.tensors, runtime=RUNTIMES[runtime])


def test_a_pin_beyond_the_runtime_is_refused() -> None:
    with pytest.raises(PlanError) as refused:
        cost("vllm").check_pinned({NAME: (W3,)})
    assert refused.value.problem == f"{NAME} is pinned to w3g64: vllm takes 4, 8 bits, not 3"
    assert refused.value.hint == (
        "pin it to a width that the runtime takes, or name another --runtime"
    )


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
    with pytest.raises(PlanError, match=r"pinned to w4c-2:4: 2:4 needs a multiple of 4 inputs"):
        found.check_pinned({NAME: (Candidate.parse("w4c-2:4"),)})
