from __future__ import annotations

import random

import pytest

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import Candidates, Ledger, build_ledger
from cptq.types import Budget, Scope
from tests.unit.allocation.synthetic import CANDIDATES, model


def ledger_for(
    cost: CostModel, candidates: Candidates = CANDIDATES, limit: int = 0, scope: Scope = "file"
) -> Ledger:
    budget = Budget(limit_bytes=limit, scope=scope, asked="by hand")
    return build_ledger(budget, cost, candidates)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("candidates", [CANDIDATES, CANDIDATES[:-1]])
def test_the_sum_bounds_the_file_from_both_sides(seed: int, candidates: list) -> None:
    cost, draw = model(9, seed=seed), random.Random(seed)
    ledger = ledger_for(cost, candidates)
    for _ in range(50):
        plan = {u.name: draw.choice(candidates) for u in cost.units}
        assert (
            ledger.sum_bytes(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.sum_bytes(plan)
        )


@pytest.mark.parametrize("most", [1, 3_000, 20_000, 60_000])
def test_the_bounds_hold_for_shards(most: int) -> None:
    whole, draw = model(9), random.Random(0)
    cost = CostModel(whole.units, whole.tensors, shard_bytes=most)
    assert cost.file_bytes({}) > whole.file_bytes({})
    ledger = ledger_for(cost)
    for _ in range(50):
        plan = {u.name: draw.choice(CANDIDATES) for u in cost.units}
        assert (
            ledger.sum_bytes(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.sum_bytes(plan)
        )


def test_fewer_options_have_less_slack() -> None:
    cost = model(9)
    ledger = ledger_for(cost)
    fewer = {unit.name: CANDIDATES[2:4] for unit in cost.units}
    assert ledger.restrict(fewer).slack < ledger.slack
    assert ledger.restrict(fewer) == build_ledger(ledger.budget, cost, fewer)


def test_fits_is_exact() -> None:
    cost = model(5)
    plan = {u.name: CANDIDATES[i % 7] for i, u in enumerate(cost.units)}
    for more, fits in ((-1, False), (0, True), (1, True)):
        ledger = ledger_for(cost, limit=cost.file_bytes(plan) + more)
        assert ledger.fits(plan, ledger.sum_bytes(plan)) is fits


def test_weights_alone_are_a_sum() -> None:
    cost = model(5)
    plan = {u.name: CANDIDATES[i % 7] for i, u in enumerate(cost.units)}
    ledger = ledger_for(cost, scope="weights")
    assert ledger.sum_bytes(plan) == cost.weight_bytes(plan) == ledger.count_bytes(plan)


@pytest.mark.parametrize("seed", range(5))
def test_a_limit_on_the_weights_bounds_the_file(seed: int) -> None:
    """The disk-space check and the reports need a whole-file bound, whatever the scope."""
    cost, draw = model(9, seed=seed), random.Random(seed)
    for _ in range(20):
        plan = {u.name: draw.choice(CANDIDATES) for u in cost.units}
        ledger = ledger_for(cost, limit=cost.weight_bytes(plan), scope="weights")
        bound = ledger.bound_file_bytes()
        entries = 3 * sum(len(unit.layers) for unit in cost.units)  # of about 100 bytes each
        assert cost.file_bytes(plan) <= bound <= cost.file_bytes(plan) + 120 * entries
    assert ledger_for(cost, limit=1234).bound_file_bytes() == 1234


def test_the_smallest_plan_takes_the_smallest_option_of_every_unit() -> None:
    ledger = ledger_for(model(5))
    assert set(ledger.find_smallest().values()) == {CANDIDATES[0]}
