from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptq.allocation import ALLOCATORS, knapsack
from cptq.allocation.cost import CostModel
from cptq.allocation.kmeans import cluster_line
from cptq.allocation.ledger import build_ledger
from cptq.errors import BudgetError
from cptq.types import Budget, Candidate, Event, Notice, Plan
from tests.quick import keep_quick
from tests.reference.allocation import best_clusters, best_loss, spread
from tests.unit.allocation.synthetic import CANDIDATES, model, random_table, run, table

MIXING = [name for name in ALLOCATORS if name != "uniform"]


def size(cost: CostModel, plan: Plan, candidates: tuple[Candidate, ...]) -> tuple[int, int]:
    """What the budget limits, and its limit."""
    ledger = build_ledger(plan.budget, cost, candidates)
    return ledger.count_bytes(plan.choices), ledger.limit


def assert_full(cost: CostModel, plan: Plan, candidates: tuple[Candidate, ...]) -> None:
    """No unit can take its next larger candidate."""
    ledger = build_ledger(plan.budget, cost, candidates)
    used = ledger.count_bytes(plan.choices)
    for unit, chosen in plan.choices.items():
        for candidate in candidates:
            if cost.count_unit_bytes(unit, candidate) > cost.count_unit_bytes(unit, chosen):
                larger = ledger.count_bytes({**plan.choices, unit: candidate})
                assert larger > ledger.limit or larger <= used


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 4),
    share=st.floats(0, 1),
    noise=st.sampled_from([0.0, 0.3, 2.0]),
    count=st.integers(1, 7),
    suffix=st.sampled_from(["bytes", "bpw"]),
)
def test_knapsack_is_optimal(
    seed: int, units: int, share: float, noise: float, count: int, suffix: str
) -> None:
    draw = random.Random(seed)
    candidates = tuple(sorted(draw.sample(CANDIDATES, count)))
    cost = model(units, seed=seed)
    scores = random_table(cost, seed, candidates, noise)
    sizes = sorted(
        cost.file_bytes(dict.fromkeys((u.name for u in cost.units), c)) for c in candidates
    )
    budget = Budget(limit_bytes=round(sizes[0] + share * (sizes[-1] - sizes[0])), asked="")
    if suffix == "bpw":
        bits = 8 * cost.weight_bytes(dict.fromkeys((u.name for u in cost.units), candidates[0]))
        value = bits / cost.compressible + 16 * share + 0.01
        limit = int(value * cost.compressible / 8)
        budget = Budget(limit_bytes=limit, scope="weights", asked="by hand")
    ledger = build_ledger(budget, cost, candidates)
    expected = best_loss(scores.scores, candidates, ledger.count_bytes, ledger.limit)
    if expected is None:
        with pytest.raises(BudgetError):
            run("knapsack", scores, cost, budget, candidates)
        return
    plan = run("knapsack", scores, cost, budget, candidates)
    used, limit = size(cost, plan, candidates)
    assert used <= limit
    assert plan.predicted_loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert_full(cost, plan, candidates)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40), units=st.integers(1, 3))
def test_knapsack_is_optimal_at_the_edge_of_a_plan(seed: int, extra: int, units: int) -> None:
    """Limits within a few bytes of some plan, where the digits of offsets decide."""
    cost, draw = model(units, seed=seed, sizes=(33, 34, 35)), random.Random(seed)
    scores = random_table(cost, seed, noise=1.0)
    plan = {u.name: draw.choice(CANDIDATES) for u in cost.units}
    limit = cost.file_bytes(plan) + extra - 20
    expected = best_loss(scores.scores, CANDIDATES, cost.file_bytes, limit)
    if expected is not None:
        found = run("knapsack", scores, cost, Budget(limit_bytes=limit, asked="by hand"))
        assert found.predicted_bytes <= limit
        assert found.predicted_loss == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("target", ["2.3bit", "4bit", "3.5bpw", "6.2bpw", "45%", "150KB", "16bit"])
@pytest.mark.parametrize("seed", range(2))
def test_the_budget_is_kept_and_used(name: str, target: str, seed: int) -> None:
    cost = model(15, seed=seed, sizes=(64, 96, 130))
    plan = run(name, random_table(cost, seed, noise=0.5), cost, target)
    used, limit = size(cost, plan, CANDIDATES)
    assert used <= limit
    assert plan.predicted_bytes == cost.file_bytes(plan.choices)
    assert plan.predicted_bytes <= build_ledger(plan.budget, cost, CANDIDATES).bound_file_bytes()
    assert plan.budget.scope == ("weights" if "bpw" in target else "file")
    assert list(plan.choices) == [u.name for u in cost.units]
    assert_full(cost, plan, CANDIDATES)


@pytest.mark.parametrize("target", ["2.3bit", "4bit", "3.5bpw"])
def test_the_order_of_the_allocators(target: str) -> None:
    cost = model(15, sizes=(64, 96, 130))
    scores = random_table(cost, 3)
    loss = {name: run(name, scores, cost, target).predicted_loss or 0.0 for name in ALLOCATORS}
    assert loss["knapsack"] <= loss["greedy"] * (1 + 1e-12)
    assert loss["knapsack"] <= loss["cluster"] * (1 + 1e-12)
    assert loss["knapsack"] < loss["uniform"]


def test_uniform_takes_the_largest_that_fits_and_says_what_is_left(events: list[Event]) -> None:
    cost = model(6)
    plan = run("uniform", None, cost, "3.7bit", events=events)
    assert set(plan.choices.values()) == {Candidate(bits=3, group_size=64)}
    left = plan.budget.limit_bytes - plan.predicted_bytes
    (note,) = plan.notes
    assert "w3g64" in note
    assert f"{left:,} bytes" in note
    assert [e.message for e in events if isinstance(e, Notice)] == list(plan.notes)
    assert plan.predicted_loss is None


def test_uniform_at_its_own_size_leaves_nothing() -> None:
    plan = run("uniform", None, model(6), "4bit")
    assert set(plan.choices.values()) == {Candidate(bits=4, group_size=64)}
    assert plan.notes == ()


def test_cluster_gives_sensitive_units_more_bits() -> None:
    cost = model(9, sizes=(64,))
    names = [u.name for u in cost.units]
    level = {name: 100.0 ** (i % 3) for i, name in enumerate(names)}
    scores = table(cost, lambda n, c: 0.0 if c.dense else level[n] * 4.0**-c.bits)
    plan = run("cluster", scores, cost, "5bit")
    mean = [sum(plan.choices[n].bits for n in names[k::3]) / 3 for k in range(3)]
    assert mean == sorted(mean)
    assert mean[0] < mean[2]
    assert re.search(r"3 units at w\d", plan.notes[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
def test_clusters_are_optimal(seed: int, clusters: int) -> None:
    draw = random.Random(seed)
    values = [draw.choice((1e6, 1.0)) + draw.lognormvariate(0, 2) for _ in range(9)]
    labels = cluster_line(values, clusters)
    parts = [[v for v, k in zip(values, labels, strict=True) if k == j] for j in range(clusters)]
    assert all(parts)
    means = [sum(part) / len(part) for part in parts]
    assert means == sorted(means)
    expected = best_clusters(values, clusters)
    assert sum(map(spread, parts)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "labels"),
    [([], []), ([5.0], [0]), ([2.0, 2.0], [0, 0]), ([3.0, 1.0, 3.0], [1, 0, 1])],
)
def test_fewer_values_than_clusters(values: list[float], labels: list[int]) -> None:
    assert cluster_line(values, 3) == labels


@pytest.mark.parametrize("name", list(ALLOCATORS))
def test_same_input_same_plan(name: str) -> None:
    cost = model(12)
    scores = random_table(cost, 1, noise=0.5)
    assert run(name, scores, cost, "3bit") == run(name, scores, cost, "3bit")


def test_equal_units_and_equal_scores() -> None:
    """Ties everywhere: still a plan within the budget, and quickly."""
    cost = model(40, sizes=(64,))
    scores = table(cost, lambda n, c: 4.0**-c.bits)
    plan = run("knapsack", scores, cost, "3.3bit")
    assert plan.predicted_bytes <= plan.budget.limit_bytes
    assert_full(cost, plan, CANDIDATES)


def test_scores_of_zero_still_use_the_budget() -> None:
    cost = model(6)
    plan = run("knapsack", table(cost, lambda n, c: 0.0), cost, "5bit")
    assert plan.predicted_loss == 0
    assert_full(cost, plan, CANDIDATES)


def test_a_metric_that_is_not_monotone_is_corrected_and_reported(events: list[Event]) -> None:
    cost = model(4, sizes=(64,))
    scores = table(cost, lambda n, c: {3: 1.0, 4: 5.0}.get(c.bits, 20.0 / c.bits))
    plan = run("knapsack", scores, cost, "3bit", events=events)
    warnings = [e for e in events if isinstance(e, Notice) and e.kind == "warning"]
    assert [e.subject for e in warnings] == ["output"]
    assert "4 of 4 units" in warnings[0].message
    assert plan.predicted_loss == 4.0


def test_a_budget_beyond_all_candidates_says_what_is_left() -> None:
    cost = model(4)
    plan = run("knapsack", random_table(cost), cost, "8bit", CANDIDATES[:3])
    assert {c.bits for c in plan.choices.values()} == {4}
    left = plan.budget.limit_bytes - plan.predicted_bytes
    assert f"{left:,} bytes" in plan.notes[0]


@pytest.mark.parametrize("slack", [0, 1, 7, 60, 10_000])
def test_what_bins_show_to_be_dominated_is_what_sorting_drops(slack: int) -> None:
    draw = np.random.default_rng(slack)
    nbytes, score = draw.integers(0, 3000, 2000), draw.integers(0, 400, 2000) / 7
    states = knapsack._States(
        nbytes=nbytes, score=score, reduced=score, parent=np.arange(2000), option=nbytes
    )
    few = states.select(knapsack._find_not_clearly_dominated(nbytes, score, slack))
    wanted = knapsack._drop_pareto_dominated(states, slack)
    found = knapsack._drop_pareto_dominated(few, slack)
    assert found.parent.tolist() == wanted.parent.tolist()
    assert len(few.nbytes) < 2000 or slack > 3000


def test_too_many_states_are_cut_and_reported(
    monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    monkeypatch.setattr(knapsack, "FEW_STATES", 2)
    monkeypatch.setattr(knapsack, "MOST_STATES", 4)
    cost = model(25)
    plan = run("knapsack", random_table(cost, 5), cost, "3.37bit", events=events)
    assert plan.predicted_bytes <= plan.budget.limit_bytes
    assert any(isinstance(e, Notice) and e.kind == "fallback" for e in events)


@pytest.mark.parametrize("name", keep_quick(MIXING, "knapsack"))
def test_32_blocks_of_7_layers_with_14_candidates_take_seconds(name: str) -> None:
    cost = model(224, sizes=(512, 576, 1536))
    candidates = tuple(
        Candidate(bits=bits, group_size=group) for bits in range(2, 9) for group in (32, 64)
    )
    scores = random_table(cost, 7, candidates, noise=0.1)
    start = time.perf_counter()
    plan = run(name, scores, cost, "4bit", candidates)
    assert time.perf_counter() - start < 30  # about 2 s on an idle core
    assert plan.predicted_bytes <= plan.budget.limit_bytes
