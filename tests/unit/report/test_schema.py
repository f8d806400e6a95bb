"""report.json is as docs/report.schema.json says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cptq.report import Summary
from cptq.report.render import render_json
from cptq.types import Comparison, join_results
from tests.unit.report.schema_check import list_faults

SCHEMA = json.loads(
    (Path(__file__).parents[3] / "docs" / "report.schema.json").read_text(encoding="utf-8")
)


def test_all_commands_write_what_the_schema_says(summary: Summary) -> None:
    bare = Summary(command="eval", command_line="cptq eval m", model=summary.model)
    analysis = replace(
        summary, command="analyze", plan=None, budget=None, size=None, results=(), quality=None,
        verification=None, comparison=Comparison(), front=(),
    )  # fmt: skip
    evaluation = replace(bare, comparison=join_results(summary.evaluation))
    for report in (summary, analysis, bare, evaluation):
        assert list_faults(json.loads(render_json(report)), SCHEMA) == []


def test_the_check_finds_faults(summary: Summary) -> None:
    data = json.loads(render_json(summary))
    del data["quality"]["tokens"]
    data["units"][0]["name"] = 3
    data["more"] = None
    faults = list_faults(data, SCHEMA)
    assert any("more is not known" in fault for fault in faults)
    assert any("$.units[0].name" in fault for fault in faults)
    assert any("is nothing that is allowed" in fault for fault in faults)
