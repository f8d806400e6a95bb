"""Refinement on objectives that are known in full: never worse, and better where sums mislead."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest

from cptq.allocation.knapsack import solve_knapsack
from cptq.allocation.ledger import build_ledger
from cptq.allocation.problem import AllocationProblem, build_problem
from cptq.allocation.refine import Refined, refine, swap_levels
from cptq.types import Budget, Candidate
from tests.reference.allocation import all_plans
from tests.unit.allocation.synthetic import FEW, ignore, model, random_table


def problem_of(count: int, seed: int = 0, bits: float = 3.0) -> AllocationProblem:
    cost = model(count, seed=seed)
    limit = round(cost.uniform_bytes(FEW[1]) + (bits - 3) * cost.compressible / 8) + 40
    ledger = build_ledger(Budget(limit_bytes=limit, asked="by hand"), cost, FEW)
    return build_problem(random_table(cost, seed, FEW), ledger, FEW, ignore)


class Truth:
    """Scores that add up, and a penalty for neighbours that are both narrow."""

    def __init__(
        self, problem: AllocationProblem, penalty: float, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.problem, self.penalty, self.noise, self.seed = problem, penalty, noise, seed
        self.asked = 0

    def __call__(self, choices: Mapping[str, Candidate]) -> float:
        self.asked += 1
        row = list(choices.values())
        narrow = sum(a.bits + b.bits <= 5 for a, b in itertools.pairwise(row))
        draw = random.Random(f"{self.seed} {[c.bits for c in row]}")
        loss = self.problem.predict_loss(choices) + self.penalty * narrow
        return loss * draw.lognormvariate(0, self.noise)


def run(
    problem: AllocationProblem, measure: Truth, guard: Truth, evaluations: int, seed: int = 0
) -> Refined:
    start = solve_knapsack(problem, ignore).choices
    return refine(
        problem,
        start,
        measure=measure,
        guard=guard,
        evaluations=evaluations,
        seed=seed,
        emit=ignore,
    )


@pytest.mark.parametrize("seed", range(10))
def test_it_never_ends_worse_on_either_text_nor_outside_the_budget(seed: int) -> None:
    problem = problem_of(9, seed)
    measure = Truth(problem, 0.05, noise=0.3, seed=1)
    guard = Truth(problem, 0.05, noise=0.3, seed=2)
    start = solve_knapsack(problem, ignore).choices
    found = run(problem, measure, guard, 40, seed)
    assert measure(found.choices) == found.after <= found.before == measure(start)
    assert guard(found.choices) == found.guard_after <= found.guard_before == guard(start)
    assert problem.ledger.count_bytes(found.choices) <= problem.ledger.limit
    assert found.tried <= 40


@pytest.mark.parametrize("seed", [1, 2])
def test_it_finds_what_sums_of_scores_do_not_see(seed: int) -> None:
    """The best of all plans by brute force; refinement closes most of the distance to it."""
    problem = problem_of(6, seed=seed, bits=2.6)
    truth = Truth(
        problem, penalty=5 * problem.predict_loss(solve_knapsack(problem, ignore).choices)
    )
    fitting = [
        plan
        for plan in all_plans(list(problem.options), FEW)
        if problem.ledger.count_bytes(plan) <= problem.ledger.limit
    ]
    best = min(map(truth, fitting))
    found = run(problem, truth, truth, 150)
    assert found.before > 1.5 * best, "the case must be one where the start is bad"
    assert found.after < found.before - 0.8 * (found.before - best)


def test_where_the_scores_are_the_truth_nothing_changes() -> None:
    problem = problem_of(8, seed=2)
    truth = Truth(problem, 0.0)
    found = run(problem, truth, truth, 60)
    assert found.kept == 0
    assert found.choices == dict(solve_knapsack(problem, ignore).choices)


def test_what_helps_on_one_text_alone_is_given_back() -> None:
    problem = problem_of(8, seed=1)
    measure = Truth(problem, 0.0, noise=1.0, seed=1)  # noise can be chased
    start = solve_knapsack(problem, ignore).choices

    def guard(choices: Mapping[str, Candidate]) -> float:
        return 1.0 if choices == start else 1.0 + problem.predict_loss(choices)

    found = refine(
        problem, start, measure=measure, guard=guard, evaluations=50, seed=0, emit=ignore
    )
    assert found.choices == dict(start)
    assert (found.kept, found.after) == (0, found.before)


def test_it_measures_no_more_than_asked_and_nothing_twice() -> None:
    problem = problem_of(7, seed=5)
    seen: list[tuple[Candidate, ...]] = []

    def measure(choices: Mapping[str, Candidate]) -> float:
        seen.append(tuple(choices.values()))
        return problem.predict_loss(choices)

    start = solve_knapsack(problem, ignore).choices
    refine(problem, start, measure=measure, guard=measure, evaluations=25, seed=3, emit=ignore)
    chosen = seen[:-1]  # the last is the guard's look at the start
    assert len(chosen) <= 26
    assert len(set(chosen)) == len(chosen)


def test_the_seed_decides() -> None:
    problem = problem_of(8, seed=6)
    truth = Truth(problem, 0.05)
    assert run(problem, truth, truth, 30, seed=1) == run(problem, truth, truth, 30, seed=1)


def test_a_swap_keeps_the_budget_and_spends_it() -> None:
    problem, draw = problem_of(9, seed=7), random.Random(0)
    picks = problem.to_picks(solve_knapsack(problem, ignore).choices)
    swaps = [child for _ in range(60) if (child := swap_levels(problem, picks, draw)) is not None]
    assert len(swaps) > 20
    for child in swaps:
        assert problem.fits(child)
        for unit, pick in child.items():
            if pick + 1 < len(problem.options[unit]):
                assert not problem.fits(child | {unit: pick + 1})
    assert math.isfinite(problem.sum_scores(swaps[0]))
