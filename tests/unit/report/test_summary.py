"""The summary as JSON, and the counts that every rendering shares."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cptq.report import Summary
from cptq.report.render import render_json
from cptq.report.summary import (
    SCHEMA,
    convert_to_plain,
    count_widths,
    group_notices,
    list_unplanned_layers,
    map_layer_choices,
    rank_units,
)
from cptq.report.tables import build_size_table
from cptq.types import Budget, Candidate, Notice, Plan, Scope, SensitivityTable
from tests.unit.report import synthetic


def test_json_holds_everything_and_reads_back(summary: Summary) -> None:
    data = json.loads(render_json(summary))
    assert data["schema"] == SCHEMA
    results = {"evaluation", "baseline", "paired"}  # in place of `comparison`
    assert set(data) == {"schema", "derived", *results, *Summary.__slots__} - {"comparison"}
    assert Plan.from_dict(data["plan"]) == summary.plan
    table = summary.sensitivity["cca"]
    assert SensitivityTable.from_dict(data["sensitivity"]["cca"]).digest == table.digest
    assert data["candidates"] == ["w2g64", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64", "w16"]
    assert data["units"][0]["layers"] == [layer.name for layer in summary.units[0].layers]
    assert len(data["notices"]) == len(summary.notices)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert render_json(synthetic.make_summary(blocks=3)) == render_json(
        synthetic.make_summary(blocks=3)
    )


def test_numbers_that_json_has_no_word_for_become_texts() -> None:
    found = convert_to_plain(
        {"a": float("inf"), "b": [float("nan"), -float("inf")], "c": 1.5, "d": True}
    )
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
    table = build_size_table(replace(summary, budget=budget))
    assert table is not None
    row = dict(table.rows)["budget"]
    assert row.startswith(f"3.5bpw = {budget.limit_text}, 1,234 bytes ")
    assert row.endswith("unused" if more > 0 else "over")


def test_widths_add_up_to_the_planned_weights(summary: Summary) -> None:
    rows = count_widths(summary)
    linears = [layer for unit in summary.units for layer in unit.layers]
    assert sum(row.layers for row in rows) == len(linears) == 35
    assert sum(row.weights for row in rows) == sum(layer.numel for layer in linears)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.bits for row in rows] == sorted(row.bits for row in rows)
    by_hand: dict[str, int] = {}
    for candidate in map_layer_choices(summary).values():
        by_hand[candidate.label] = by_hand.get(candidate.label, 0) + 1
    assert {row.label: row.layers for row in rows} == by_hand


def test_layers_of_a_unit_share_its_choice(summary: Summary) -> None:
    choices = map_layer_choices(summary)
    assert summary.plan is not None
    for unit in summary.units:
        assert {choices[layer.name] for layer in unit.layers} == {summary.plan.choices[unit.name]}


def test_what_no_unit_holds_is_left_alone(summary: Summary) -> None:
    assert [layer.name for layer in list_unplanned_layers(summary)] == [
        "model.embed_tokens",
        "lm_head",
    ]


def test_without_a_plan_there_are_no_widths(summary: Summary) -> None:
    bare = replace(summary, plan=None)
    assert count_widths(bare) == []
    assert map_layer_choices(bare) == {}


def test_the_most_sensitive_are_the_highest(summary: Summary) -> None:
    table = summary.sensitivity["output"]
    found = rank_units(table, 4)
    assert [score for _, score in found] == sorted(table.per_unit.values(), reverse=True)[:4]
    odd = replace(table, per_unit={"a": float("nan"), "b": 1.0, "c": 1.0, "d": float("inf")})
    assert rank_units(odd, 9) == [("b", 1.0), ("c", 1.0)]


def test_notices_that_changed_the_result_come_first() -> None:
    notices = [
        Notice(kind=kind, subject="s", message=str(index))
        for index, kind in enumerate(("info", "skipped", "fallback", "info"))
    ]
    grouped = group_notices(notices)
    assert list(grouped) == ["fallback", "skipped", "info"]
    assert [notice.message for notice in grouped["info"]] == ["0", "3"]


def test_candidates_as_keys() -> None:
    assert convert_to_plain({Candidate(bits=4, group_size=64): 1.0}) == {"w4g64": 1.0}
