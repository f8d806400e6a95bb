from __future__ import annotations

import random

import pytest

from cptq.allocation import ledger as ledgers
from cptq.allocation.ledger import file_ledger, per_unit, weights_ledger
from cptq.layouts import safetensors_header
from tests.unit.allocation.synthetic import CANDIDATES, model


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("candidates", [CANDIDATES, CANDIDATES[:-1]])
def test_the_sum_bounds_the_file_from_both_sides(seed: int, candidates: list) -> None:
    cost, draw = model(9, seed=seed), random.Random(seed)
    ledger = file_ledger(cost, per_unit(cost, candidates), 0)
    for _ in range(50):
        plan = {u.name: draw.choice(candidates) for u in cost.units}
        assert ledger.total(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.total(plan)


def test_the_bounds_hold_for_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header.total_bytes, "__defaults__", (20_000,))
    monkeypatch.setattr(ledgers, "SHARD_BYTES", 20_000)
    cost, draw = model(9), random.Random(0)
    ledger = file_ledger(cost, per_unit(cost, CANDIDATES), 0)
    for _ in range(50):
        plan = {u.name: draw.choice(CANDIDATES) for u in cost.units}
        assert ledger.total(plan) - ledger.slack <= cost.file_bytes(plan) <= ledger.total(plan)


def test_fewer_options_have_less_slack() -> None:
    cost = model(9)
    ledger = file_ledger(cost, per_unit(cost, CANDIDATES), 0)
    assert ledger.restricted(per_unit(cost, CANDIDATES[2:4])).slack < ledger.slack


def test_fits_is_exact() -> None:
    cost = model(5)
    plan = {u.name: CANDIDATES[i % 7] for i, u in enumerate(cost.units)}
    for more, fits in ((-1, False), (0, True), (1, True)):
        ledger = file_ledger(cost, per_unit(cost, CANDIDATES), cost.file_bytes(plan) + more)
        assert ledger.fits(plan, ledger.total(plan)) is fits


def test_weights_alone_are_a_sum() -> None:
    cost = model(5)
    plan = {u.name: CANDIDATES[i % 7] for i, u in enumerate(cost.units)}
    ledger = weights_ledger(cost, per_unit(cost, CANDIDATES), 0)
    assert ledger.total(plan) == cost.weight_bytes(plan) == ledger.exact(plan)
