from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import LEVELS, parse_target, resolve_budget, resolve_target
from cptq.errors import BudgetError
from cptq.types import Budget, Candidate, TensorSpec
from tests.unit.allocation.synthetic import CANDIDATES, model

COST = model(12, sizes=(64, 128, 192))


def limit(text: str, cost: CostModel = COST) -> int:
    return resolve_target(text, cost, 64, CANDIDATES).limit


def uniform(bits: int) -> int:
    if bits == 2:  # the least counts with the scales whose entries in the header are longest
        return COST.count_uniform_bytes(Candidate(bits=2, group_size=32, scales="e4m3"))
    return COST.count_uniform_bytes(Candidate(bits=bits, group_size=64 if bits < 16 else 0))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_whole_bits_are_the_uniform_model(bits: int) -> None:
    assert limit(f"{bits}bit") == uniform(bits)


def test_fractions_of_bits_lie_between() -> None:
    assert limit("3.5bit") == (uniform(3) + uniform(4)) // 2
    assert limit("12 bits") == (uniform(8) + uniform(16)) // 2


def test_bits_do_not_depend_on_the_candidates() -> None:
    few = [Candidate(bits=3, group_size=32), Candidate(bits=16)]
    assert resolve_target("4bit", COST, 64, few).limit == uniform(4)


def test_percent_is_of_the_checkpoint_at_16_bits() -> None:
    assert limit("50%") == COST.dense_file_bytes // 2
    wide = model(12, dtype="F32", sizes=(64, 128, 192))
    assert limit("60%", wide) == int(wide.dense_file_bytes * Fraction(60, 100))
    assert wide.dense_bytes > 1.9 * wide.dense_file_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("200KB", 200_000), ("0.2mb", 200_000), ("200 KiB", 204_800), (".0002GB", 200_000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert limit(text) == nbytes


def test_bpw_limits_the_weights_and_nothing_else() -> None:
    ledger = resolve_target("3.5bpw", COST, 64, CANDIDATES)
    limit_bytes = COST.compressible * 7 // 16
    assert ledger.budget == Budget(limit_bytes=limit_bytes, scope="weights", asked="3.5bpw")
    plan = {u.name: CANDIDATES[1] for u in COST.units}
    assert COST.weight_bytes(plan) <= ledger.limit
    assert COST.file_bytes(plan) <= ledger.bound_file_bytes()


def test_a_target_is_resolved_once_and_the_ledger_holds_the_budget() -> None:
    for text in ("3.7bit", "4bpw", "40%", "200KB"):
        budget = resolve_budget(parse_target(text), COST, 64)
        assert budget.asked == text
        ledger = resolve_target(text, COST, 64, CANDIDATES)
        assert ledger == build_ledger(budget, COST, CANDIDATES)


@pytest.mark.parametrize("bits", [Fraction(3, 2), Fraction(1, 1000), Fraction(20)])
def test_beyond_the_levels_the_line_is_continued(bits: Fraction) -> None:
    low, high = LEVELS[:2] if bits < 2 else LEVELS[-2:]
    slope = Fraction(uniform(high) - uniform(low), high - low)
    budget = resolve_budget(parse_target(f"{float(bits)}bit"), COST, 64)
    assert budget.limit_bytes == math.floor(uniform(low) + slope * (bits - low))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(7, 3), "2.34bit"),
        (Fraction(4), "4bit"),
        (Fraction(1, 10), "0.1bit"),
        (Fraction(1, 3000), "0.000334bit"),
    ],
)
def test_a_value_is_rounded_up_and_spelled_as_typed(value: Fraction, text: str) -> None:
    target = parse_target("1bit")
    assert target.spell(value) == text
    assert target.round_up(value) == parse_target(text).value >= value


@pytest.mark.parametrize("text", ["banana", "", "4", "bit", "4 bit wide", "nanbit", "1e3MB", "4x"])
def test_an_invalid_target_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(repr(text))) as error:
        limit(text)
    for example in ("4bit", "3.5bpw", "25%", "120MB"):
        assert example in str(error.value.allowed)
    assert error.value.exit_code == 2


def test_a_bare_number_is_asked_about() -> None:
    with pytest.raises(BudgetError) as error:
        limit("4")
    assert "4bit?" in str(error.value.hint)


@pytest.mark.parametrize("text", ["0%", "-3bit", "0MB", "-0.5bpw", "0.0bit"])
def test_targets_must_be_above_0(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(text)) as error:
        limit(text)
    assert "4bit" in str(error.value.allowed)


@pytest.mark.parametrize("text", ["17bit", "101%", "16.5bpw", "5MB", "1GiB"])
def test_above_the_dense_model(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(text)) as error:
        limit(text)
    least, most = str(error.value.allowed).split(" to ")
    assert limit(least) <= limit(most)


@pytest.mark.parametrize("text", ["0.5bit", "1.9bit", "1bpw", "5%", "20KB", "1KiB"])
def test_too_small_names_the_smallest_that_works(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(text)) as error:
        limit(text)
    hint = str(error.value.hint).removeprefix("type --target ")
    suffix = parse_target(text).suffix
    assert hint.endswith(suffix)
    assert limit(hint) > 0
    slightly_less = f"{float(hint.removesuffix(suffix)) - 0.02:.2f}{suffix}"
    with pytest.raises(BudgetError):
        limit(slightly_less)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["bit", "bpw", "%", "KB", "KiB"]),
    st.sets(st.sampled_from(CANDIDATES), min_size=1),
    st.sampled_from([0, 32, 64]),
)
def test_the_smallest_that_is_named_always_works(
    suffix: str, candidates: set[Candidate], group: int
) -> None:
    chosen = sorted(candidates)
    with pytest.raises(BudgetError) as error:
        resolve_target(f"0.001{suffix}", COST, group, chosen)
    found = re.search(r"--target (\S+)", str(error.value))
    assert found
    ledger = resolve_target(found[1], COST, group, chosen)
    assert ledger.budget.asked == found[1]
    smallest = ledger.find_smallest()
    assert ledger.count_bytes(smallest) <= ledger.limit
    assert COST.file_bytes(smallest) <= ledger.bound_file_bytes()


def test_a_model_without_compressible_weights() -> None:
    cost = CostModel([], [TensorSpec(name="wte.weight", dtype="F32", shape=(50, 8))])
    assert resolve_target("4bit", cost, 64, CANDIDATES).limit == cost.dense_bytes
    with pytest.raises(BudgetError, match="4bpw") as error:
        resolve_target("4bpw", cost, 64, CANDIDATES)
    assert "100%" in str(error.value.allowed)
