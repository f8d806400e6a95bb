"""Constraints: what they read, what they refuse, and that allocators keep to them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import pytest

from cptq.allocation import ALLOCATORS
from cptq.allocation.allocate import allocate
from cptq.allocation.constraints import Pin, apply_constraints, parse_constraints, parse_pin
from cptq.allocation.even import spread_evenly
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import resolve_target
from cptq.errors import BudgetError, PlanError, UsageError
from cptq.types import Budget, Candidate, Event, LayerSpec, Notice, Plan, SensitivityTable
from tests.reference.allocation import all_plans
from tests.unit.allocation.synthetic import FEW, FINGERPRINT, ignore, model, random_table
from tests.unit.report import synthetic

WIDTHS = synthetic.CANDIDATES
UNITS = synthetic.make_units(4)


def options(
    pins: Sequence[str] = (), least: Sequence[str] = (), most: Sequence[str] = (), emit=ignore
) -> dict[str, tuple[Candidate, ...]]:
    constraints = parse_constraints(pins, least, most)
    return apply_constraints(constraints, UNITS, WIDTHS, group_size=64, emit=emit)


def bits(row: Sequence[Candidate]) -> list[int]:
    return [candidate.bits for candidate in row]


def test_a_pin_holds_the_units_that_it_finds_and_no_other() -> None:
    found = options(["down_proj=8bit", r"layers\.0\.qkv = 16bit"])
    for name, row in found.items():
        if "down_proj" in name:
            assert [c.label for c in row] == ["w8g64"]
        elif name == "model.layers.0.qkv":
            assert [c.label for c in row] == ["w16"]
        else:
            assert row == WIDTHS


def test_a_layer_of_a_fused_unit_pins_the_whole_unit_and_a_notice_says_so(
    events: list[Event],
) -> None:
    found = options(["v_proj=6"], emit=events.append)
    assert bits(found["model.layers.2.qkv"]) == [6]
    (notice,) = [e for e in events if isinstance(e, Notice)]
    assert (notice.kind, notice.subject) == ("info", "--pin v_proj=6bit")
    assert "q_proj, k_proj" in notice.message
    assert "v_proj" not in notice.message


def test_bits_that_no_candidate_has_get_the_runs_group_size() -> None:
    assert options(["o_proj=7bit"])["model.layers.1.self_attn.o_proj"] == (
        Candidate(bits=7, group_size=64),
    )


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("down_proj", "down_proj=8bit"),
        ("=8bit", "down_proj=8bit"),
        ("down_proj=lots", "down_proj=8bit"),
        ("down_proj=9bit", "2, 3, 4, 5, 6, 7, 8, 16"),
        ("down(=8bit", "down_proj=8bit"),
    ],
)
def test_a_pin_that_cannot_be_read_is_refused(text: str, allowed: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--pin {text!r}")) as caught:
        parse_pin(text)
    assert allowed in str(caught.value.allowed)


def test_an_expression_may_hold_an_equals_sign() -> None:
    assert parse_pin("(?=.*down)=4bits") == Pin(pattern="(?=.*down)", bits=4)


def test_a_pin_that_finds_nothing_names_what_is_near() -> None:
    with pytest.raises(PlanError, match="'dwn_proj=8bit'") as caught:
        options(["dwn_proj=8"])
    assert "'down_proj'" in str(caught.value.hint)


def test_a_pin_of_what_stays_dense_gives_the_reason() -> None:
    head = LayerSpec(
        name="lm_head", block=None, role="head", kind="head", shape=(9, 9), dtype="F16",
        compressible=False, reason="the output head",
    )  # fmt: skip
    pinned = parse_constraints(["lm_head=8bit"], (), ())
    with pytest.raises(PlanError, match=r"'lm_head=8bit'.* lm_head\b.*\(the output head\)"):
        apply_constraints(pinned, UNITS, WIDTHS, group_size=64, layers=(head,), emit=ignore)


def test_pins_that_disagree_are_an_error_and_pins_that_agree_are_none() -> None:
    named = r"'layers\.0=4bit'.*'down=8bit'.*layers\.0\.mlp\.down_proj"
    with pytest.raises(PlanError, match=named):
        options([r"layers.0=4bit", "down=8bit"])
    assert options(["layers.0=4bit", "layers.0.mlp=4bit"])


def test_bits_hold_for_a_role_or_for_all_and_a_pin_overrides_them() -> None:
    found = options(["layers.3.mlp.down=2bit"], ["3", "down=5"], ["6", "qkv=4"])
    assert bits(found["model.layers.0.mlp.down_proj"]) == [5, 6]
    assert bits(found["model.layers.0.qkv"]) == [3, 4]
    assert bits(found["model.layers.0.self_attn.o_proj"]) == [3, 4, 5, 6]
    assert bits(found["model.layers.3.mlp.down_proj"]) == [2]
    # a layer's role stands for its unit
    assert bits(options([], ["v=8"])["model.layers.1.qkv"]) == [8, 16]


@pytest.mark.parametrize(
    ("least", "most", "error", "words"),
    [
        (["dwn=4"], [], UsageError, "--min-bits .*'dwn'.*allowed: qkv, q, k, v, o.*'down'"),
        (["x"], [], UsageError, "--min-bits 'x'"),
        ([], ["1"], UsageError, "--max-bits '1'"),
        (["4", "5"], [], UsageError, "--min-bits .* 4 and 5 "),
        (["down=6"], ["down=5"], BudgetError, "down_proj.* 6 to 5 bits"),
        (["7"], ["7"], BudgetError, "7 to 7 bits.* 2, 3, 4, 5, 6, 8, 16"),
    ],
)
def test_bits_that_contradict_are_refused(
    least: list[str], most: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        options([], least, most)


# allocators under constraints


def random_options(names: Sequence[str], draw: random.Random) -> dict[str, tuple[Candidate, ...]]:
    """Each unit at will: all candidates, some, or one."""
    return {name: tuple(sorted(draw.sample(FEW, draw.choice([4, 4, 2, 1])))) for name in names}


def solved(
    name: str, table: SensitivityTable, cost, limit: int, rows: dict[str, tuple[Candidate, ...]]
) -> Plan:
    ledger = build_ledger(Budget(limit_bytes=limit, asked="by hand"), cost, rows)
    return allocate(name, table, ledger, FEW, model_fingerprint=FINGERPRINT, emit=ignore)


@pytest.mark.parametrize("seed", range(12))
def test_allocators_keep_to_what_units_may_have_and_knapsack_is_the_best_of_all_plans(
    seed: int,
) -> None:
    cost, draw = model(5, seed=seed), random.Random(seed)
    table = random_table(cost, seed, FEW)
    rows = random_options([unit.name for unit in cost.units], draw)
    plans = [
        plan
        for plan in all_plans(list(rows), FEW)
        if all(plan[name] in rows[name] for name in rows)
    ]
    sizes = sorted(map(cost.file_bytes, plans))
    limit = sizes[len(sizes) // 2] + 3
    best = min(
        sum(table.scores[unit][c] for unit, c in plan.items())
        for plan in plans
        if cost.file_bytes(plan) <= limit
    )
    for name in ALLOCATORS:
        try:
            plan = solved(name, table, cost, limit, rows)
        except BudgetError:
            assert name in ("uniform", "even")  # no single level need fit
            continue
        assert all(plan.choices[unit] in rows[unit] for unit in rows), name
        assert plan.predicted_bytes == cost.file_bytes(plan.choices) <= limit, name
        found = sum(table.scores[unit][c] for unit, c in plan.choices.items())
        assert found >= best * (1 - 1e-12), name
        if name == "knapsack":
            assert found == pytest.approx(best)


def test_a_budget_that_the_pins_do_not_leave_is_refused_with_the_nearest_that_works() -> None:
    cost = model(5)
    rows = {unit.name: (Candidate(bits=8, group_size=64),) for unit in cost.units[:3]}
    rows |= {unit.name: FEW for unit in cost.units[3:]}
    with pytest.raises(BudgetError, match=r"2bit.*--pin, --min-bits, --max-bits") as caught:
        resolve_target("2bit", cost, 64, rows)
    nearest = str(caught.value.hint).removeprefix("type --target ")
    ledger = resolve_target(nearest, cost, 64, rows)
    least = {u: min(row, key=lambda c: cost.unit_bytes(u, c)) for u, row in rows.items()}
    assert cost.file_bytes(least) <= ledger.limit


def test_a_pinned_unit_needs_no_score() -> None:
    cost = model(4)
    table = random_table(cost, 0, FEW)
    seven = Candidate(bits=7, group_size=64)
    rows = {unit.name: FEW for unit in cost.units} | {cost.units[0].name: (seven,)}
    plan = solved("knapsack", table, cost, cost.dense_bytes, rows)
    assert plan.choices[cost.units[0].name] == seven


# even


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_any_first_few_of_a_spread_lie_evenly(count: int) -> None:
    names = [str(k) for k in range(count)]
    order = [int(name) for name in spread_evenly(names)]
    assert sorted(order) == list(range(count))
    for first in range(2, count):
        ordered = sorted(order[:first])
        gaps = [b - a for a, b in itertools.pairwise(ordered)]
        assert max(gaps) <= 2 * -(-count // first)


def test_even_is_uniform_where_that_fits_exactly_and_two_neighbours_between() -> None:
    cost = model(9)
    four, three = FEW[2], FEW[1]
    table = random_table(cost, 3, FEW)
    rows = {unit.name: FEW for unit in cost.units}
    exact = solved("even", table, cost, cost.uniform_bytes(four), rows)
    assert set(exact.choices.values()) == {four}
    limit = (cost.uniform_bytes(three) + cost.uniform_bytes(four)) // 2
    between = solved("even", table, cost, limit, rows)
    assert set(between.choices.values()) == {three, four}
    smallest = min(
        cost.file_bytes(between.choices | {u: four}) - cost.file_bytes(between.choices)
        for u, c in between.choices.items()
        if c == three
    )
    assert limit - smallest < between.predicted_bytes <= limit
