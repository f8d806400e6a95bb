"""Plans hold only what the runtime takes; the rest is refused, or kept dense and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

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
from cptq.errors import CptqError, ModelError, PlanError, UnknownNameError, UsageError
from cptq.layouts.groups import resolve_group
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import Candidate, Notice, Plan
from tests.unit.allocation.synthetic import FINGERPRINT, model, table

E = TypeVar("E", bound=CptqError)
SIZES = (64, 128, 96, 160, 40)  # 40 and 96 are not for everyone


def settings(**more: Any) -> CompressSettings:
    return CompressSettings(
        model=ModelSettings(model="m"), calibration=CalibrationSettings(), **more
    )


def catch(kind: type[E], refused: Callable[[], object]) -> E:
    """The error of this type that `refused` raises."""
    with pytest.raises(kind) as raised:
        refused()
    return raised.value


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
            assert runtime.explain_refusal(layer, choice, group) is None
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
    assert RUNTIMES["llamacpp"].bits == (3, 4, 5, 6, 8)
    assert RUNTIMES["llamacpp"].super_bits == (3, 6)
    assert RUNTIMES["llamacpp"].groups == (32,)


@pytest.mark.parametrize(
    ("name", "bits", "group", "value", "allowed"),
    [
        ("vllm", (3, 4), 64, "3", "4, 8, 16"),
        ("vllm", (4,), 48, "48", "32, 64, 128, 0"),
        ("llamacpp", (4,), 64, "64", "32"),
        ("llamacpp", (2, 7), 32, "2, 7", "3, 4, 5, 6, 8, 16"),
    ],
)
def test_options_that_a_runtime_does_not_take_are_refused(
    name: str, bits: tuple[int, ...], group: int, value: str, allowed: str
) -> None:
    for refused in (
        lambda: RUNTIMES[name].check(bits, group),
        lambda: settings(runtime=name, bits=bits, group_size=group),
    ):
        error = catch(UsageError, refused)
        assert f" {value}, " in error.problem
        assert f"--runtime {name}" in error.problem
        assert allowed in str(error.allowed)


def test_asymmetric_grids_are_for_the_widths_that_have_a_block() -> None:
    layer = cost_for("llamacpp").units[0].layers[0]
    explain_refusal = RUNTIMES["llamacpp"].explain_refusal
    for label, taken in {"w4g32-asym": True, "w5g32-asym": True, "w8g32-asym": False}.items():
        assert (explain_refusal(layer, Candidate.parse(label), 32) is None) == taken
    why = str(explain_refusal(layer, Candidate.parse("w8g32-asym"), 32))
    assert all(word in why for word in ("llamacpp", "asymmetric", "4, 5", "8"))
    sparse = str(explain_refusal(layer, Candidate.parse("w4g32-s50"), 32))
    assert "llamacpp" in sparse
    assert "sparse" in sparse
    asked = settings(runtime="llamacpp", asymmetric=True, bits=(4, 8), group_size=32)
    assert command_line(asked).count("--asymmetric") == 1
    error = catch(UsageError, lambda: settings(asymmetric=True))
    assert "--asymmetric" in error.problem
    assert error.allowed == "--runtime llamacpp or cptq"
    idle = {"runtime": "llamacpp", "asymmetric": True, "bits": (8, 16), "group_size": 32}
    error = catch(UsageError, lambda: settings(**idle))
    assert "--asymmetric" in error.problem
    assert "8,16" in error.problem
    assert "4, 5" in str(error.allowed)


def test_k_scales_are_for_the_widths_that_have_a_super_block() -> None:
    runtime, layer = RUNTIMES["llamacpp"], model(1, sizes=(256,)).units[0].layers[0]
    made = [runtime.choose_grid(Candidate(bits=bits, group_size=32)) for bits in runtime.bits]
    assert [c.label for c in made] == ["w3g16-k", "w4g32", "w5g32", "w6g16-k", "w8g32"]
    assert all(runtime.choose_grid(candidate) == candidate for candidate in made)
    for candidate in made:
        assert runtime.explain_refusal(layer, candidate, candidate.group_size) is None
        assert Candidate.parse(candidate.label) == candidate
    for label, name, words in (
        ("w6g32", "llamacpp", "llamacpp takes k scales, in groups of 16, at 6 bits"),
        ("w4g16-k", "llamacpp", "llamacpp takes no k scales at 4 bits"),
        ("w6g16-k", "cptq", "cptq takes no k scales at 6 bits"),
    ):
        candidate = Candidate.parse(label)
        found = RUNTIMES[name].explain_refusal(layer, candidate, candidate.group_size)
        assert found == words


def test_16_bit_scales_leave_out_the_widths_with_k_scales() -> None:
    plain = {"runtime": "llamacpp", "group_size": 32, "scales": "16bit"}
    assert settings(**plain, bits=RUNTIMES["llamacpp"].default_bits).scales == "16bit"
    for more in ({"bits": (3, 4, 6)}, {"bits": (4,), "embedding_bits": 6}):
        error = catch(UsageError, lambda more=more: settings(**plain, **more))
        assert "--runtime llamacpp does not take with --scales 16bit" in error.problem
        assert error.allowed == "--scales auto, or 4, 5, 8, 16"


def test_embeddings_are_for_the_runtimes_and_widths_that_have_them() -> None:
    asked = settings(runtime="llamacpp", bits=(4,), group_size=32, embedding_bits=8)
    assert asked.embedding_bits == 8
    plain = {"bits": (4,), "group_size": 32}
    seven = {"runtime": "llamacpp", **plain, "embedding_bits": 7}
    error = catch(UsageError, lambda: settings(**seven))
    assert error.problem == "--embedding-bits is 7"
    assert error.allowed == "3, 4, 5, 6, 8, 16 with --runtime llamacpp"
    assert settings(**plain, embedding_bits=8).embedding_bits == 8
    error = catch(UsageError, lambda: settings(runtime="vllm", **plain, embedding_bits=8))
    assert "--embedding-bits" in error.problem
    assert error.allowed == "--runtime transformers or llamacpp or cptq"
    error = catch(UsageError, lambda: settings(runtime="llamacpp", **plain, sparsity=("2:4",)))
    assert "--sparsity" in error.problem
    assert error.allowed == "--runtime cptq"


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


def test_a_runtime_brings_its_own_bits_and_groups() -> None:
    found = settings_from(CompressSettings, {"model": "m", "runtime": "llamacpp"})
    assert (found.bits, found.group_size) == ((3, 4, 5, 6, 8, 16), 32)
    usual = settings_from(CompressSettings, {"model": "m"})
    assert (usual.bits, usual.group_size) == ((2, 3, 4, 5, 6, 8, 16), 64)
    assert command_line(found) == "cptq compress m --runtime llamacpp"
    assert command_line(usual) == "cptq compress m"


def test_an_unknown_runtime_is_refused_with_the_nearest() -> None:
    error = catch(UnknownNameError, lambda: find_runtime("vlm"))
    assert "'vlm'" in error.problem
    assert error.allowed == ", ".join(RUNTIMES)
    assert "'vllm'" in str(error.hint)


def test_a_plan_edited_beyond_the_runtime_is_refused() -> None:
    plan, cost = plan_for("vllm", "uniform", [])
    first = next(unit for unit, choice in plan.choices.items() if choice.dense)
    wrong = Plan(**{**_fields(plan), "choices": {**plan.choices, first: offered("vllm")[0]}})
    error = catch(PlanError, lambda: check_plan(wrong, cost, FINGERPRINT))
    assert first in str(error)
    assert "vllm" in str(error)
    assert "--runtime" in str(error)


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
        RUNTIMES[name].check_tensors([attention, apart, stacked])
        return
    error = catch(ModelError, lambda: RUNTIMES[name].check_tensors([attention, apart]))
    assert apart in error.problem
    assert f"--runtime {name}" in error.problem
