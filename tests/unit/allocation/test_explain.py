"""Explanations of a plan's choices, against counts and sums made by hand."""

from __future__ import annotations

import pytest

from cptq.allocation.allocate import allocate
from cptq.allocation.explain import explain_unit, find_choice
from cptq.allocation.ledger import Ledger, build_ledger
from cptq.allocation.problem import build_problem
from cptq.types import Budget, Candidate, Plan, SensitivityTable
from tests.unit.allocation.synthetic import CANDIDATES, FINGERPRINT, ignore, model, random_table


def plan_for(share: float) -> tuple[Plan, Ledger, SensitivityTable]:
    cost = model(7)
    table = random_table(cost, 3, CANDIDATES)
    least = build_ledger(Budget(limit_bytes=0, asked="0"), cost, CANDIDATES)
    low = cost.file_bytes(least.find_smallest())
    limit = int(low + share * (cost.dense_bytes - low))
    ledger = build_ledger(Budget(limit_bytes=limit, asked="some"), cost, CANDIDATES)
    plan = allocate(
        "knapsack", table, ledger, CANDIDATES, model_fingerprint=FINGERPRINT, emit=ignore
    )
    return plan, ledger, table


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_steps_are_what_the_whole_file_and_the_sum_of_scores_change_by(share: float) -> None:
    plan, ledger, table = plan_for(share)
    problem = build_problem(table, ledger, CANDIDATES, ignore)
    for unit in plan.choices:
        found = explain_unit(unit, plan, ledger, problem)
        for step in found.steps:
            other = {**plan.choices, unit: step.candidate}
            size = ledger.cost.file_bytes(other) - ledger.cost.file_bytes(plan.choices)
            loss = problem.predict_loss(other) - problem.predict_loss(plan.choices)
            assert step.nbytes == size
            assert step.loss == pytest.approx(loss, abs=1e-12)
        assert [s.nbytes for s in found.steps] == sorted(s.nbytes for s in found.steps)
        assert found.chosen.label in found.spell_reason()
        assert found.left == ledger.limit - ledger.count_bytes(plan.choices)


def test_ranks_count_the_steps_that_are_worth_more() -> None:
    plan, ledger, table = plan_for(0.4)
    problem = build_problem(table, ledger, CANDIDATES, ignore)
    found = {unit: explain_unit(unit, plan, ledger, problem) for unit in plan.choices}
    rates = {}
    for unit, row in problem.options.items():
        own = next(o for o in row if o.candidate == plan.choices[unit])
        better = [o for o in row if o.nbytes > own.nbytes and o.score < own.score]
        if better:
            rates[unit] = (own.score - better[0].score) / (better[0].nbytes - own.nbytes)
    order = sorted(rates, key=lambda unit: -rates[unit])
    assert {u: e.rank for u, e in found.items() if e.rank} == {
        unit: i for i, unit in enumerate(order, start=1)
    }
    assert {e.price for e in found.values()} == {rates[order[0]]}


def test_an_option_is_named_by_its_label_or_its_bits() -> None:
    plain, narrow = Candidate(bits=4, group_size=64), Candidate.parse("w4g32-e4m3")
    sparse, wide = Candidate.parse("w4g64-2:4"), Candidate(bits=8, group_size=64)
    sizes = {plain: 10, narrow: 11, sparse: 7, wide: 20}
    scores = {plain: 0.5, narrow: 0.25, sparse: 0.1, wide: 0.0}
    assert find_choice("4", sizes, scores) == narrow
    assert find_choice("4", sizes, {}) == plain
    assert find_choice("w4g64", sizes, scores) == plain
    assert find_choice("w4g64-2:4", sizes, scores) == sparse
    assert find_choice("5", sizes, scores) is None
