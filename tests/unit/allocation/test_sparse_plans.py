"""Plans that weigh sparsity against bits."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cptq.allocation import BLIND
from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import resolve_target
from cptq.errors import BudgetError
from cptq.types import Candidate, Event, Notice, Plan, SensitivityTable
from tests.unit.allocation.synthetic import packed_model, run, table

LABELS = ("w3g64", "w3g64-2:4", "w3g64-s50", "w4g64", "w4g64-2:4", "w8g64-s50", "w16")
CANDIDATES = tuple(sorted(map(Candidate.parse, LABELS)))
PLAIN = tuple(c for c in CANDIDATES if not c.sparsity)


SIZES = (48, 64, 80, 132)


def scores(cost: CostModel, seed: int) -> SensitivityTable:
    """A unit minds rounding and lost weights each in its own measure."""
    draw = random.Random(seed)
    minds = {u.name: (draw.lognormvariate(0, 1), draw.lognormvariate(-4, 2)) for u in cost.units}

    def score(name: str, candidate: Candidate) -> float:
        rounding, pruning = minds[name]
        lost = pruning * candidate.sparsity * (1.3 if candidate.pattern == "2:4" else 1.0)
        return 0.0 if candidate.dense else rounding * 4.0**-candidate.bits + lost

    return table(cost, score, CANDIDATES)


def best(cost: CostModel, known: SensitivityTable, plan: Plan) -> float:
    """The least sum of scores within the budget, by trying every plan."""
    ledger = build_ledger(plan.budget, cost, CANDIDATES)
    losses = []
    for picks in itertools.product(CANDIDATES, repeat=len(cost.units)):
        choices = {unit.name: pick for unit, pick in zip(cost.units, picks, strict=True)}
        if ledger.count_bytes(choices) <= ledger.limit:
            losses.append(math.fsum(known.scores[u][c] for u, c in choices.items()))
    return min(losses)


@pytest.mark.parametrize("target", ["2.5bit", "3bit", "4bit", "5.5bpw"])
@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_finds_the_best_mixture(seed: int, target: str) -> None:
    cost = packed_model(4, seed=seed, sizes=SIZES)
    known = scores(cost, seed)
    try:
        plan = run("knapsack", known, cost, target, CANDIDATES)
    except BudgetError:
        assert resolve_target("3bit", cost, 64, CANDIDATES)  # 2.5bit may be below the smallest
        assert target == "2.5bit"
        return
    raw = math.fsum(known.scores[unit][choice] for unit, choice in plan.choices.items())
    assert raw == pytest.approx(plan.predicted_loss) == pytest.approx(best(cost, known, plan))
    assert cost.file_bytes(plan.choices) == plan.predicted_bytes
    assert cost.size_report(plan.choices).count_bytes(plan.budget.scope) <= plan.budget.limit_bytes


@pytest.mark.parametrize("allocator", ["knapsack", "greedy", "cluster"])
def test_an_option_that_loses_to_a_smaller_one_of_another_kind_is_never_taken(
    allocator: str, events: list[Event]
) -> None:
    """Bytes are left over, and no unit gets a larger sparse option that is worse."""
    cost = packed_model(6, sizes=SIZES)

    def score(name: str, candidate: Candidate) -> float:
        return 0.0 if candidate.dense else 4.0**-candidate.bits + 10 * candidate.sparsity

    plan = run(allocator, table(cost, score, CANDIDATES), cost, "3.7bit", CANDIDATES, events)
    sparse = [label for label in (c.label for c in plan.choices.values()) if "-" in label]
    assert not sparse
    assert not [e for e in events if isinstance(e, Notice) and e.kind == "warning"]


@pytest.mark.parametrize("allocator", BLIND)
def test_without_scores_nothing_becomes_sparse_and_a_notice_says_so(
    allocator: str, events: list[Event]
) -> None:
    cost = packed_model(6, sizes=SIZES)
    plan = run(allocator, None, cost, "3.7bit", CANDIDATES, events)
    assert plan.choices == run(allocator, None, cost, "3.7bit", PLAIN).choices
    told = [e for e in events if isinstance(e, Notice) and "spars" in e.message]
    assert [(note.kind, note.subject) for note in told] == [("warning", allocator)]


def test_a_unit_whose_inputs_four_does_not_divide_has_no_2_4(events: list[Event]) -> None:
    cost = packed_model(8, sizes=(48, 7))
    ragged = {u.name for u in cost.units if u.layers[0].shape[1] == 7}
    offered = tuple(c for c in CANDIDATES if c.bits in (4, 16))

    def score(name: str, candidate: Candidate) -> float:
        return (
            1.0 / cost.unit_bytes(name, candidate) if cost.refusal(name, candidate) is None else 9
        )

    known = table(cost, score, offered)
    plan = run("knapsack", known, cost, "4bit", offered, events)
    assert ragged
    assert all("2:4" not in plan.choices[name].label for name in ragged)
    (told,) = [e for e in events if isinstance(e, Notice) and e.kind == "skipped"]
    assert sorted(ragged)[0] in told.subject
    assert "--sparsity" in told.message
    assert cost.refusal(sorted(ragged)[0], Candidate.parse("w4g64-2:4")) in told.message
