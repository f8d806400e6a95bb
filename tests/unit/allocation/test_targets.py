from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import file_ledger, per_unit
from cptq.allocation.targets import ledger_of, parse_target, resolve_budget, smallest_plan
from cptq.errors import BudgetError
from cptq.types import Candidate, TensorSpec
from tests.unit.allocation.synthetic import CANDIDATES, model

COST = model(12, sizes=(64, 128, 192))


def limit(text: str, cost: CostModel = COST) -> int:
    return resolve_budget(text, cost, 64, CANDIDATES).limit_bytes


def uniform(bits: int) -> int:
    return COST.uniform_bytes(Candidate(bits=bits, group_size=64 if bits < 16 else 0))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_whole_bits_are_the_uniform_model(bits: int) -> None:
    assert limit(f"{bits}bit") == uniform(bits)


def test_fractions_of_bits_lie_between() -> None:
    assert limit("3.5bit") == (uniform(3) + uniform(4)) // 2
    assert limit("12 bits") == (uniform(8) + uniform(16)) // 2


def test_bits_do_not_depend_on_the_candidates() -> None:
    few = [Candidate(bits=3, group_size=32), Candidate(bits=16)]
    assert resolve_budget("4bit", COST, 64, few).limit_bytes == uniform(4)


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
    budget = resolve_budget("3.5bpw", COST, 64, CANDIDATES)
    ledger = ledger_of(budget, COST, CANDIDATES)
    assert ledger.weights_only
    assert ledger.limit == COST.compressible * 7 // 16
    plan = {u.name: CANDIDATES[1] for u in COST.units}
    assert COST.weight_bytes(plan) <= ledger.limit
    assert COST.file_bytes(plan) <= budget.limit_bytes


@pytest.mark.parametrize("text", ["banana", "", "4", "bit", "4 bit wide", "nanbit", "1e3MB", "4x"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"is no target; allowed: 4bit .*25%, 120MB") as error:
        limit(text)
    assert error.value.exit_code == 2


def test_a_bare_number_is_asked_about() -> None:
    with pytest.raises(BudgetError, match=r"did you mean 4bit\?"):
        limit("4")


@pytest.mark.parametrize("text", ["0%", "-3bit", "0MB", "-0.5bpw", "0.0bit"])
def test_targets_must_be_above_0(text: str) -> None:
    with pytest.raises(BudgetError, match="not above 0"):
        limit(text)


@pytest.mark.parametrize("text", ["17bit", "101%", "16.5bpw", "5MB", "1GiB"])
def test_above_the_dense_model(text: str) -> None:
    with pytest.raises(BudgetError, match="above the uncompressed model") as error:
        limit(text)
    least, most = str(error.value.allowed).split(" to ")
    assert limit(least) <= limit(most)


@pytest.mark.parametrize("text", ["0.5bit", "1.9bit", "1bpw", "5%", "20KB", "1KiB"])
def test_too_small_names_the_smallest_that_works(text: str) -> None:
    with pytest.raises(BudgetError, match="below the smallest") as error:
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
        resolve_budget(f"0.001{suffix}", COST, group, chosen)
    found = re.search(r"--target (\S+)", str(error.value))
    assert found
    budget = resolve_budget(found[1], COST, group, chosen)
    assert budget.asked == found[1]
    ledger = file_ledger(COST, per_unit(COST, chosen), 0)
    assert COST.file_bytes(smallest_plan(ledger)) <= budget.limit_bytes


def test_a_model_without_compressible_weights() -> None:
    cost = CostModel([], [TensorSpec(name="wte.weight", dtype="F32", shape=(50, 8))])
    assert resolve_budget("4bit", cost, 64, CANDIDATES).limit_bytes == cost.dense_bytes
    with pytest.raises(BudgetError, match="the model has none"):
        resolve_budget("4bpw", cost, 64, CANDIDATES)
