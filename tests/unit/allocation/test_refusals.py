"""Scores, budgets and plans that are refused before an allocator runs; plans edited by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from cptq.allocation import ALLOCATORS
from cptq.allocation.allocate import check_plan
from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import resolve_target
from cptq.errors import BudgetError, PlanError, UnknownNameError
from cptq.types import Budget, Candidate, Plan, Scope
from tests.unit.allocation.synthetic import CANDIDATES, FINGERPRINT, model, random_table, run, table


def test_no_units_make_an_empty_plan() -> None:
    cost = CostModel([], model(2).tensors)
    for name in ALLOCATORS:
        plan = run(name, table(cost, lambda n, c: 0.0), cost, "4bit")
        assert plan.choices == {}
        assert plan.predicted_bytes == cost.dense_bytes


def test_a_missing_candidate_is_named() -> None:
    cost = model(3)
    scores = random_table(cost, candidates=CANDIDATES[:3])
    with pytest.raises(PlanError, match=r"'model\.layers\.0' at w5g64"):
        run("greedy", scores, cost, "4bit")


def test_a_missing_unit_is_named() -> None:
    cost = model(3)
    scores = random_table(model(2))
    with pytest.raises(PlanError, match=r"'model\.layers\.2'"):
        run("knapsack", scores, cost, "4bit")


def test_a_missing_sensitivity_is_named() -> None:
    cost = model(3)
    scores = replace(random_table(cost), per_unit={"model.layers.0": 1.0})
    with pytest.raises(PlanError, match=r"'model\.layers\.1'"):
        run("cluster", scores, cost, "4bit")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    cost = model(2)
    scores = table(cost, lambda n, c: bad if c.bits == 5 else 1.0)
    with pytest.raises(PlanError, match=rf"'model\.layers\.0' at w5g64 .*{bad}"):
        run("knapsack", scores, cost, "4bit")


def test_scores_of_another_model_are_refused() -> None:
    cost = model(2)
    scores = replace(random_table(cost), model_fingerprint="e" * 64)
    with pytest.raises(PlanError, match="e" * 12):
        run("knapsack", scores, cost, "4bit")


def test_scores_are_needed() -> None:
    with pytest.raises(PlanError, match="greedy") as refused:
        run("greedy", None, model(2), "4bit")
    assert "--metric" in str(refused.value.hint)


def test_no_candidates() -> None:
    with pytest.raises(PlanError) as refused:
        run("uniform", None, model(2), Budget(limit_bytes=1, asked=""), ())
    assert "--bits" in str(refused.value.allowed)


@pytest.mark.parametrize("scope", ["file", "weights"])
def test_a_budget_below_everything(scope: Scope) -> None:
    cost = model(2)
    budget = Budget(limit_bytes=1000, scope=scope, asked="by hand")
    smallest = dict.fromkeys((unit.name for unit in cost.units), CANDIDATES[0])
    need = cost.size_report(smallest).count_bytes(scope)
    with pytest.raises(BudgetError, match=rf"1,000 bytes.* \(by hand\).*{need:,}"):
        run("uniform", None, cost, budget)


def test_an_unknown_allocator() -> None:
    with pytest.raises(UnknownNameError, match=r"'knapsak'.*'knapsack'"):
        run("knapsak", None, model(2), "4bit")


def plan_of(cost: CostModel) -> Plan:
    return run("knapsack", random_table(cost), cost, "4bit")


def test_a_plan_edited_by_hand_is_checked() -> None:
    cost = model(3)
    plan = plan_of(cost)
    check_plan(plan, cost, FINGERPRINT)
    fewer = replace(plan, choices=dict(list(plan.choices.items())[1:]))
    more = replace(plan, choices={**plan.choices, "nope": CANDIDATES[0]})
    lopsided = replace(
        plan, choices={**plan.choices, cost.units[0].name: Candidate.parse("w4c-asym")}
    )
    for bad, words in (
        (fewer, re.escape(cost.units[0].name)),
        (more, "'nope'"),
        (lopsided, rf"w4c-asym .*{re.escape(cost.units[0].name)}"),
    ):
        with pytest.raises(PlanError, match=words):
            check_plan(bad, cost, FINGERPRINT)
    with pytest.raises(PlanError, match="f" * 12):
        check_plan(plan, cost, "e" * 64)


def test_a_plan_survives_json() -> None:
    plan = plan_of(model(3))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_plan_in_bits_per_weight_survives_json() -> None:
    cost = model(3)
    plan = run("knapsack", random_table(cost), cost, "4bpw")
    assert plan.budget.scope == "weights"
    assert plan.to_dict()["budget"] == {
        "limit_bytes": cost.compressible * 4 // 8, "asked": "4bpw", "scope": "weights",
    }  # fmt: skip
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("target", ["4bit", "4bpw", "40%", "60KB"])
def test_a_plan_of_before_scopes_bounds_the_whole_file(target: str) -> None:
    """Its limit was that of the file whatever the target, so it is one that the plan keeps."""
    cost = model(6)
    ledger = resolve_target(target, cost, 64, CANDIDATES)
    data = run("knapsack", random_table(cost), cost, target).to_dict()
    data["budget"] = {"limit_bytes": ledger.bound_file_bytes(), "asked": target}
    old = Plan.from_dict(data)
    assert old.budget == Budget(limit_bytes=ledger.bound_file_bytes(), scope="file", asked=target)
    check_plan(old, cost, FINGERPRINT)
    assert cost.size_report(old.choices).count_bytes(old.budget.scope) <= old.budget.limit_bytes
    assert build_ledger(old.budget, cost, CANDIDATES).budget == old.budget


@pytest.mark.parametrize(
    ("budget", "error", "named"),
    [
        ({"limit_bytes": 1, "asked": "x", "scope": "weight"}, ValueError, "'weight'.*'weights'"),
        ({"limit_bytes": "much", "asked": "x"}, ValueError, "'much'"),
        ({"asked": "x"}, TypeError, "limit_bytes"),
        ({"limit_bytes": 1, "asked": "x", "unit": "B"}, TypeError, "unit"),
    ],
)
def test_a_budget_that_cannot_be_read_is_named(
    budget: dict[str, Any], error: type[Exception], named: str
) -> None:
    data = plan_of(model(3)).to_dict() | {"budget": budget}
    with pytest.raises(error, match=named):
        Plan.from_dict(data)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, cptq.allocation.allocate\n"
        "from cptq.allocation import ALLOCATORS\n"
        "[ALLOCATORS.get(name) for name in ALLOCATORS]\n"
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
