"""The summary as JSON, and the counts that every rendering shares."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cptq.report import Summary, VerificationFacts, words
from cptq.report.render import render_json
from cptq.report.summary import SCHEMA, plain
from cptq.report.tables import size_table, verification_words
from cptq.report.tally import (
    compare,
    layer_choices,
    left_alone,
    most_sensitive,
    notices_by_kind,
    widths,
)
from cptq.types import Budget, Candidate, EvalResult, Notice, Plan, Scope, SensitivityTable
from tests.unit.report import fake


@pytest.fixture(scope="module")
def summary() -> Summary:
    return fake.summary(blocks=5)


def test_json_holds_everything_and_reads_back(summary: Summary) -> None:
    data = json.loads(render_json(summary))
    assert data["schema"] == SCHEMA
    assert set(data) == {"schema", *Summary.__slots__}
    assert Plan.from_dict(data["plan"]) == summary.plan
    table = summary.sensitivity["cca"]
    assert SensitivityTable.from_dict(data["sensitivity"]["cca"]).digest == table.digest
    assert data["candidates"] == ["w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64", "w16"]
    assert data["units"][0]["layers"] == [layer.name for layer in summary.units[0].layers]
    assert len(data["notices"]) == len(summary.notices)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert render_json(fake.summary(blocks=3)) == render_json(fake.summary(blocks=3))


def test_numbers_that_json_has_no_word_for_become_texts() -> None:
    found = plain({"a": float("inf"), "b": [float("nan"), -float("inf")], "c": 1.5, "d": True})
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "a": "inf", "b": ["nan", "-inf"], "c": 1.5, "d": True,
    }  # fmt: skip
    assert float(found["a"]) == float("inf")


@pytest.mark.parametrize("scope", ["file", "weights"])
@pytest.mark.parametrize("more", [1234, -1234])
def test_the_budget_row_counts_what_the_budget_limits(
    summary: Summary, scope: Scope, more: int
) -> None:
    assert summary.size is not None
    limit = summary.size.count_bytes(scope) + more
    budget = Budget(limit_bytes=limit, scope=scope, asked="3.5bpw")
    table = size_table(replace(summary, budget=budget))
    assert table is not None
    row = dict(table.rows)["budget"]
    assert row.startswith(f"3.5bpw = {budget.limit_text}, 1,234 bytes ")
    assert row.endswith("left" if more > 0 else "above")


def test_widths_add_up_to_the_planned_weights(summary: Summary) -> None:
    rows = widths(summary)
    linears = [layer for unit in summary.units for layer in unit.layers]
    assert sum(row.layers for row in rows) == len(linears) == 35
    assert sum(row.weights for row in rows) == sum(layer.numel for layer in linears)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.bits for row in rows] == sorted(row.bits for row in rows)
    by_hand: dict[str, int] = {}
    for candidate in layer_choices(summary).values():
        by_hand[candidate.label] = by_hand.get(candidate.label, 0) + 1
    assert {row.label: row.layers for row in rows} == by_hand


def test_layers_of_a_unit_share_its_choice(summary: Summary) -> None:
    choices = layer_choices(summary)
    assert summary.plan is not None
    for unit in summary.units:
        assert {choices[layer.name] for layer in unit.layers} == {summary.plan.choices[unit.name]}


def test_what_no_unit_holds_is_left_alone(summary: Summary) -> None:
    assert [layer.name for layer in left_alone(summary)] == ["model.embed_tokens", "lm_head"]


def test_without_a_plan_there_are_no_widths(summary: Summary) -> None:
    bare = replace(summary, plan=None)
    assert widths(bare) == []
    assert layer_choices(bare) == {}


def test_the_most_sensitive_are_the_highest(summary: Summary) -> None:
    table = summary.sensitivity["output"]
    found = most_sensitive(table, 4)
    assert [score for _, score in found] == sorted(table.per_unit.values(), reverse=True)[:4]
    odd = replace(table, per_unit={"a": float("nan"), "b": 1.0, "c": 1.0, "d": float("inf")})
    assert most_sensitive(odd, 9) == [("b", 1.0), ("c", 1.0)]


def result(
    value: float, *, higher: bool = False, metric: str = "m", version: int = 1
) -> EvalResult:
    return EvalResult(
        task="t", version=version, metric=metric, value=value, unit="u", samples=1, seconds=1.0,
        higher_is_better=higher,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "base", "higher", "verdict"),
    [
        (2.0, 1.0, False, "worse"),
        (1.0, 2.0, False, "better"),
        (2.0, 1.0, True, "better"),
        (1.0, 2.0, True, "worse"),
        (1.0, 1.0, True, "same"),
        (float("nan"), 1.0, True, ""),
    ],
)
def test_the_verdict_knows_the_direction(
    own: float, base: float, higher: bool, verdict: str
) -> None:
    (row,) = compare([result(own, higher=higher)], [result(base, higher=higher)])
    assert row.verdict == verdict


def test_only_the_same_number_is_compared() -> None:
    own = [result(1.0, metric="a"), result(1.0, metric="b", version=2)]
    rows = compare(own, [result(3.0, metric="b"), result(4.0, metric="a")])
    assert [row.difference for row in rows] == [-3.0, None]
    assert rows[1].verdict == ""


def test_notices_that_changed_the_result_come_first() -> None:
    notices = [
        Notice(kind=kind, subject="s", message=str(index))
        for index, kind in enumerate(("info", "skipped", "fallback", "info"))
    ]
    grouped = notices_by_kind(notices)
    assert list(grouped) == ["fallback", "skipped", "info"]
    assert [notice.message for notice in grouped["info"]] == ["0", "3"]


def test_verification_in_words() -> None:
    facts = VerificationFacts(missing=("a", "b", "c", "d"), max_abs_difference=0.5)
    assert not facts.clean
    assert verification_words(facts) == "4 missing: a, b, c; outputs differ by at most 0.5"
    assert "not compared" in verification_words(VerificationFacts())
    assert VerificationFacts().clean


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.size(999), "999 B"),
        (words.size(84_213_456), "84.21 MB"),
        (words.size(2_500_000_000), "2.5 GB"),
        (words.size_exact(84_213_456), "84.21 MB (84,213,456 bytes)"),
        (words.count(134_515_008), "134.5 M"),
        (words.number(None), "-"),
        (words.number(float("inf")), "inf"),
        (words.number(27.0512), "27.05"),
        (words.number(12345.6), "12,346"),
        (words.number(0.000123456), "0.0001235"),
        (words.number(3.0), "3"),
        (words.number(4_431_000_123.0), "4,431,000,123"),
        (words.signed(0.5), "+0.5"),
        (words.signed(-0.5), "-0.5"),
        (words.seconds(0.0), "0 s"),
        (words.seconds(0.42), "0.42 s"),
        (words.seconds(119.6), "2 min 00 s"),
        (words.seconds(7440), "2 h 04 min"),
        (words.percent(0.41624), "41.6%"),
        (words.plural(1, "layer"), "1 layer"),
        (words.plural(2100, "layer"), "2,100 layers"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_candidates_as_keys() -> None:
    assert plain({Candidate(bits=4, group_size=64): 1.0}) == {"w4g64": 1.0}
