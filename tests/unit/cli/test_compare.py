from __future__ import annotations

import json

from cptq.config import CompareSettings
from cptq.config.values import command_line


def test_the_models_and_options_reach_the_pipeline(cptq, pipeline) -> None:
    answer = cptq("compare", "a", "b", "c", "--task", "pydoc", "--limit", "9", "--no-footprint")
    assert answer.exit_code == 0, answer.output
    (seen,) = pipeline.seen
    assert isinstance(seen, CompareSettings)
    assert (seen.sources, seen.tasks, seen.limit) == (("a", "b", "c"), ("pydoc",), 9)
    assert seen.no_footprint
    line = command_line(seen)
    assert line == "cptq compare a b c --task pydoc --limit 9 --no-footprint"


def test_the_table_fits_eighty_columns_and_says_who_is_on_the_front(cptq) -> None:
    out = cptq("compare", "a", "b").stdout
    assert max(map(len, out.splitlines())) <= 80
    assert "Size and quality: wikitext" in out
    assert "Difference from dense on the same samples" in out
    (row,) = [line for line in out.splitlines() if "+1.1 to +1.9" in line]
    assert row.startswith("four ")
    assert row.split()[-1] == "worse"


def test_json_and_quiet(cptq) -> None:
    data = json.loads(cptq("compare", "a", "b", "--format", "json").stdout)
    assert data["command"] == "compare"
    assert [m["on_front"] for m in data["comparison"]["models"]] == [True, True, False, True]
    assert "per_sample" not in data["comparison"]["models"][0]["results"][0]
    lines = cptq("compare", "a", "b", "--format", "quiet").stdout.splitlines()
    assert lines == ["20.0", "21.5", "22.0", "30.0"]


def test_strict_reaches_eval(cptq, pipeline) -> None:
    assert cptq("eval", "a", "--strict").exit_code == 0
    assert pipeline.seen[0].strict
