"""What no allocator is given: scores, budgets and plans that do not fit; and plans by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from cptq.allocation import ALLOCATORS
from cptq.allocation.allocate import check_plan
from cptq.allocation.cost import CostModel
from cptq.errors import BudgetError, PlanError, UnknownNameError
from cptq.types import Budget, Candidate, Plan
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
    with pytest.raises(PlanError, match=r"no score for 'model\.layers\.0' at w5g64"):
        run("greedy", scores, cost, "4bit")


def test_a_missing_unit_is_named() -> None:
    cost = model(3)
    scores = random_table(model(2))
    with pytest.raises(PlanError, match=r"no scores for 'model\.layers\.2'"):
        run("knapsack", scores, cost, "4bit")


def test_a_missing_sensitivity_is_named() -> None:
    cost = model(3)
    scores = replace(random_table(cost), per_unit={"model.layers.0": 1.0})
    with pytest.raises(PlanError, match=r"no sensitivity of 'model\.layers\.1'"):
        run("cluster", scores, cost, "4bit")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    cost = model(2)
    scores = table(cost, lambda n, c: bad if c.bits == 5 else 1.0)
    with pytest.raises(PlanError, match=r"score of 'model\.layers\.0' at w5g64 is"):
        run("knapsack", scores, cost, "4bit")


def test_scores_of_another_model_are_refused() -> None:
    cost = model(2)
    scores = replace(random_table(cost), model_fingerprint="e" * 64)
    with pytest.raises(PlanError, match="made on another model"):
        run("knapsack", scores, cost, "4bit")


def test_scores_are_needed() -> None:
    with pytest.raises(PlanError, match="needs the scores of a metric"):
        run("greedy", None, model(2), "4bit")


def test_no_candidates() -> None:
    with pytest.raises(PlanError, match="no candidates"):
        run("uniform", None, model(2), Budget(limit_bytes=1, asked=""), ())


def test_a_budget_below_everything() -> None:
    with pytest.raises(BudgetError, match="below the smallest plan"):
        run("uniform", None, model(2), Budget(limit_bytes=1000, asked="by hand"))


def test_an_unknown_allocator() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'knapsack'"):
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
        (fewer, "says nothing about"),
        (more, "no unit 'nope'"),
        (lopsided, "stored"),
    ):
        with pytest.raises(PlanError, match=words):
            check_plan(bad, cost, FINGERPRINT)
    with pytest.raises(PlanError, match="made for another model"):
        check_plan(plan, cost, "e" * 64)


def test_a_plan_survives_json() -> None:
    plan = plan_of(model(3))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, cptq.allocation.allocate\n"
        "from cptq.allocation import ALLOCATORS\n"
        "[ALLOCATORS.get(name) for name in ALLOCATORS]\n"
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
