"""What a runtime takes, plans obey; what it does not take is refused or kept dense, and said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cptq.allocation import ALLOCATORS
from cptq.allocation.allocate import allocate, check_plan
from cptq.allocation.cost import CostModel
from cptq.allocation.targets import resolve_target
from cptq.config import (
    RUNTIMES,
    CalibrationSettings,
    CompressSettings,
    ModelSettings,
    command_line,
    find_runtime,
    settings_from,
)
from cptq.errors import ModelError, PlanError, UnknownNameError, UsageError
from cptq.layouts.groups import resolve_group
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import Candidate, Notice, Plan
from tests.unit.allocation.synthetic import FINGERPRINT, model, table

SIZES = (64, 128, 96, 160, 40)  # 40 and 96 are not for everyone


def cost_for(name: str) -> CostModel:
    plain = model(9, sizes=SIZES)
    return CostModel(plain.units, plain.tensors, PACK_QUANTIZED, RUNTIMES[name])


def offered(name: str) -> tuple[Candidate, ...]:
    runtime = RUNTIMES[name]
    return tuple(
        Candidate(bits=b, group_size=0 if b == 16 else runtime.group_size)
        for b in runtime.default_bits
    )


def plan_for(name: str, allocator: str, events: list[Any]) -> tuple[Plan, CostModel]:
    cost, candidates = cost_for(name), offered(name)
    scores = table(cost, lambda unit, c: 0.0 if c.dense else len(unit) / c.bits, candidates)
    ledger = resolve_target("9bit", cost, RUNTIMES[name].group_size, candidates)
    plan = allocate(
        allocator,
        scores,
        ledger,
        candidates,
        model_fingerprint=FINGERPRINT,
        emit=events.append,
    )
    return plan, cost


@pytest.mark.parametrize("allocator", list(ALLOCATORS))
@pytest.mark.parametrize("name", list(RUNTIMES))
def test_every_allocator_obeys_every_runtime(name: str, allocator: str) -> None:
    runtime, events = RUNTIMES[name], list[Any]()
    plan, cost = plan_for(name, allocator, events)
    for unit in cost.units:
        choice = plan.choices[unit.name]
        for layer in unit.layers:
            group = resolve_group(layer.shape[1], choice.group_size)
            assert runtime.refusal(layer, choice, group) is None
            assert choice.dense or (
                choice.bits in runtime.bits
                and layer.shape[0] % runtime.out_multiple == 0
                and layer.shape[1] % runtime.in_multiple == 0
            )
    assert plan.predicted_bytes <= plan.budget.limit_bytes
    check_plan(plan, cost, FINGERPRINT)
    kept = [e for e in events if isinstance(e, Notice) and e.message.startswith("kept dense")]
    assert bool(kept) == (name in ("vllm", "llamacpp"))


def test_the_rules_are_those_that_were_measured() -> None:
    assert RUNTIMES["transformers"].bits == (2, 3, 4, 5, 6, 7, 8)
    assert RUNTIMES["vllm"].bits == (4, 8)
    assert RUNTIMES["vllm"].groups == (32, 64, 128, 0)
    assert RUNTIMES["llamacpp"].bits == (4, 5, 8)
    assert RUNTIMES["llamacpp"].groups == (32,)


@pytest.mark.parametrize(
    ("name", "bits", "group", "words"),
    [
        ("vllm", (3, 4), 64, r"holds 3, .*--runtime vllm.*; allowed: 4, 8, 16"),
        ("vllm", (4,), 48, r"48, .*; allowed: groups of 32, 64, 128, 0 \(per channel\)"),
        ("llamacpp", (4,), 64, r"64, .*; allowed: groups of 32"),
        ("llamacpp", (2, 6), 32, "holds 2, 6"),
    ],
)
def test_options_that_a_runtime_does_not_take_are_refused(
    name: str, bits: tuple[int, ...], group: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        RUNTIMES[name].check(bits, group)
    with pytest.raises(UsageError, match=words):
        settings(runtime=name, bits=bits, group_size=group)


def test_asymmetric_grids_are_for_the_widths_that_have_a_block() -> None:
    layer = cost_for("llamacpp").units[0].layers[0]
    refusal = RUNTIMES["llamacpp"].refusal
    for label, taken in {"w4g32-asym": True, "w5g32-asym": True, "w8g32-asym": False}.items():
        assert (refusal(layer, Candidate.parse(label), 32) is None) == taken
    why = refusal(layer, Candidate.parse("w8g32-asym"), 32)
    assert why == "of asymmetric grids llamacpp takes 4, 5, not 8 bits"
    assert refusal(layer, Candidate.parse("w4g32-s50"), 32) == "llamacpp takes no sparse weights"
    asked = settings(runtime="llamacpp", asymmetric=True, bits=(4, 8), group_size=32)
    assert command_line(asked).count("--asymmetric") == 1
    with pytest.raises(UsageError, match=r"--asymmetric .*; allowed: --runtime llamacpp or cptq"):
        settings(asymmetric=True)
    with pytest.raises(UsageError, match="does nothing at --bits 8,16; allowed: with one of 4, 5"):
        settings(runtime="llamacpp", asymmetric=True, bits=(8, 16), group_size=32)


def test_embeddings_are_for_the_runtimes_and_widths_that_have_them() -> None:
    asked = settings(runtime="llamacpp", bits=(4,), group_size=32, embedding_bits=8)
    assert asked.embedding_bits == 8
    with pytest.raises(UsageError, match=r"--embedding-bits is 6; allowed: 8 \("):
        settings(runtime="llamacpp", bits=(4,), group_size=32, embedding_bits=6)
    with pytest.raises(UsageError, match=r"--embedding-bits .*--runtime llamacpp or cptq"):
        settings(bits=(4,), group_size=32, embedding_bits=8)
    with pytest.raises(UsageError, match=r"--sparsity .*; allowed: --runtime cptq"):
        settings(runtime="llamacpp", bits=(4,), group_size=32, sparsity=("2:4",))


def test_the_format_is_the_portable_one_where_that_holds_the_plan() -> None:
    layers = [layer for unit in model(2).units for layer in unit.layers]
    conv1d = [replace(layer, kind="conv1d", transposed=True) for layer in layers]
    runtime = RUNTIMES["llamacpp"]
    assert runtime.format_for(layers, asymmetric=False) == "compressed-tensors"
    assert runtime.format_for(layers, asymmetric=True) == "packed"
    assert runtime.format_for(conv1d, asymmetric=False) == "packed"
    dense = [replace(layer, compressible=False) for layer in conv1d]
    assert runtime.format_for(dense, asymmetric=False) == "compressed-tensors"
    assert RUNTIMES["cptq"].format_for(layers, asymmetric=False) == "packed"


def settings(**more: Any) -> CompressSettings:
    return CompressSettings(
        model=ModelSettings(model="m"), calibration=CalibrationSettings(), **more
    )


def test_a_runtime_brings_its_own_bits_and_groups() -> None:
    found = settings_from(CompressSettings, {"model": "m", "runtime": "llamacpp"})
    assert (found.bits, found.group_size) == ((4, 5, 8, 16), 32)
    usual = settings_from(CompressSettings, {"model": "m"})
    assert (usual.bits, usual.group_size) == ((2, 3, 4, 5, 6, 8, 16), 64)
    assert command_line(found) == "cptq compress m --runtime llamacpp"
    assert command_line(usual) == "cptq compress m"


def test_an_unknown_runtime_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'vlm'; allowed: .*; did you mean 'vllm'\?"):
        find_runtime("vlm")


def test_a_plan_edited_beyond_the_runtime_is_refused() -> None:
    plan, cost = plan_for("vllm", "uniform", [])
    first = next(unit for unit, choice in plan.choices.items() if choice.dense)
    wrong = Plan(**{**_fields(plan), "choices": {**plan.choices, first: offered("vllm")[0]}})
    with pytest.raises(PlanError, match=r"model\.layers.*: vllm takes .*--runtime"):
        check_plan(wrong, cost, FINGERPRINT)


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__}


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_a_mixture_of_experts_is_taken_apart_or_refused_in_words(name: str) -> None:
    attention = "model.layers.0.self_attn.q_proj.weight"
    apart, stacked = (
        f"model.layers.0.mlp.experts.{end}" for end in ("3.up_proj.weight", "gate_up_proj")
    )
    RUNTIMES[name].check_tensors([attention])
    if RUNTIMES[name].experts:
        RUNTIMES[name].check_tensors([attention, apart])
        with pytest.raises(ModelError, match=r"one stacked tensor .*experts\.gate_up_proj"):
            RUNTIMES[name].check_tensors([attention, stacked])
        return
    with pytest.raises(ModelError, match=rf"mixture of experts.*--runtime {name} does not take"):
        RUNTIMES[name].check_tensors([attention, apart])
