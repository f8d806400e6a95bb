"""Experts share one scheme, whatever allocates; and it is the best one that they can share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cptq.allocation import ALLOCATORS, BLIND
from cptq.allocation.allocate import allocate, check_plan
from cptq.allocation.cost import CostModel
from cptq.allocation.experts import check_tied, fix_experts, list_experts
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import resolve_target
from cptq.errors import BudgetError, PlanError
from cptq.types import Candidate, Plan, TensorSpec
from tests.unit.allocation.synthetic import (
    CANDIDATES,
    FINGERPRINT,
    W3,
    W4,
    W16,
    ignore,
    layer,
    random_table,
    run,
    table,
    unit,
)


def mixture(inner: int = 64, blocks: int = 3, experts: int = 4) -> CostModel:
    """Blocks of an attention matrix and experts of two layers each."""
    units, tensors = [], []
    for block in range(blocks):
        stem = f"model.layers.{block}"
        layers = [layer(f"{stem}.attn", (128, 128), block=block)]
        for index in range(experts):
            name = f"{stem}.mlp.experts.{index}"
            layers.append(layer(f"{name}.up", (inner, 128), block=block))
            layers.append(layer(f"{name}.down", (128, inner), block=block))
        units += [unit(spec.name, spec) for spec in layers]
        tensors += [TensorSpec(name=x.weight_name, dtype="F16", shape=x.shape) for x in layers]
    return CostModel(units, tensors)


def of_experts(plan: Plan, cost: CostModel) -> set[Candidate]:
    return {plan.choices[name] for name in list_experts(cost.units)}


def test_experts_are_known_by_name() -> None:
    names = list_experts(mixture(blocks=1, experts=1).units)
    assert names == ["model.layers.0.mlp.experts.0.up", "model.layers.0.mlp.experts.0.down"]


@pytest.mark.parametrize("name", list(ALLOCATORS))
@pytest.mark.parametrize("target", ["2.7bpw", "4bit", "5bpw"])
def test_every_allocator_gives_them_one_candidate(name: str, target: str) -> None:
    cost = mixture()
    scores = None if name in BLIND else random_table(cost, seed=3)
    plan = run(name, scores, cost, target)
    chosen = of_experts(plan, cost)
    assert len(chosen) == 1
    assert not next(iter(chosen)).dense
    ledger = build_ledger(plan.budget, cost, CANDIDATES)
    assert ledger.count_bytes(plan.choices) <= ledger.limit
    assert plan.predicted_bytes <= ledger.bound_file_bytes()
    check_plan(plan, cost, FINGERPRINT)


def test_no_other_candidate_of_the_experts_makes_a_better_plan() -> None:
    cost = mixture()
    scores = random_table(cost, seed=5)
    plan = run("knapsack", scores, cost, "3.6bpw")
    ledger, losses = build_ledger(plan.budget, cost, CANDIDATES), []
    for candidate in CANDIDATES[:-1]:
        fixed = fix_experts(ledger, candidate)
        assert fixed == build_ledger(plan.budget, cost, fixed.bytes_of)
        try:
            other = allocate(
                "knapsack",
                scores,
                fixed,
                CANDIDATES,
                model_fingerprint=FINGERPRINT,
                emit=ignore,
            )
        except BudgetError:
            continue
        losses.append(other.predicted_loss)
    assert len(losses) > 1
    assert plan.predicted_loss == min(losses)


def test_a_budget_for_the_whole_model_leaves_it_dense() -> None:
    cost = mixture(blocks=1)
    plan = run("knapsack", random_table(cost, seed=5), cost, "16bit")
    assert set(plan.choices.values()) == {W16}


def test_experts_that_hardly_matter_pay_for_the_attention() -> None:
    cost = mixture()

    def score(name: str, candidate: Candidate) -> float:
        weight = 1e-4 if ".experts." in name else 1.0
        return 0.0 if candidate.dense else weight * 4.0**-candidate.bits

    plan = run("knapsack", table(cost, score), cost, "3.6bpw")
    attention = {plan.choices[f"model.layers.{block}.attn"].bits for block in range(3)}
    assert min(attention) > next(iter(of_experts(plan, cost))).bits


def test_an_edited_plan_is_refused_where_it_breaks_the_rule() -> None:
    cost = mixture()
    plan = run("knapsack", random_table(cost), cost, "4bit")
    first, *_, last = list_experts(cost.units)
    chosen = plan.choices[first]
    other = W3 if chosen != W3 else W4
    labels = ", ".join(sorted((chosen.label, other.label)))
    with pytest.raises(PlanError, match=labels):
        check_plan(replace(plan, choices={**plan.choices, last: other}), cost, FINGERPRINT)
    dense = {**plan.choices, **dict.fromkeys(list_experts(cost.units), W16)}
    with pytest.raises(PlanError) as refused:
        check_tied(cost.units, dense)
    assert "below 16 bits" in str(refused.value.allowed)
    check_tied(cost.units, dict.fromkeys(plan.choices, W16))


def test_one_group_must_do_for_all_layers() -> None:
    """Groups of 64 do not divide 96 inputs, where cptq would take 48 or so."""
    cost = mixture(inner=96)
    with pytest.raises(PlanError, match=r"96 and 128 .*allowed: --group-size .* 32"):
        run("knapsack", random_table(cost), cost, "4bit")


def test_pins_that_part_the_experts_are_refused() -> None:
    cost = mixture()
    options = {u.name: CANDIDATES for u in cost.units}
    budget = resolve_target("5bpw", cost, 64, options).budget

    def with_pins(**pins: Candidate) -> Plan:
        rows = options | {name: (pin,) for name, pin in pins.items()}
        return allocate(
            "knapsack",
            random_table(cost),
            build_ledger(budget, cost, rows),
            CANDIDATES,
            model_fingerprint=FINGERPRINT,
            emit=ignore,
        )

    first, second, *_ = list_experts(cost.units)
    with pytest.raises(PlanError, match="--pin"):
        with_pins(**{first: W3, second: W4})
    assert of_experts(with_pins(**{first: W3}), cost) == {W3}
