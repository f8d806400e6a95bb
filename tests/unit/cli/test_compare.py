from __future__ import annotations

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a",), "there is one model, and nothing to compare it with; name two"),
        ((), "no model is given"),
        (("a", "a"), "a model is named twice"),
        (("a", "absent.json"), "no file 'absent.json'; `cptq eval MODEL -o eval.json` writes one"),
        (("a", "b", "--task", "wikitex"), "did you mean 'wikitext'?"),
        (("a", "b", "--limit", "1.5"), "--limit is 1.5"),
    ],
)
def test_a_wrong_line_is_one_sentence(cptq, pipeline, words, said: str) -> None:
    answer = cptq("compare", *words)
    assert answer.exit_code == 2
    assert said in answer.stderr
    assert pipeline.seen == []


def test_nothing_is_overwritten(cptq, pipeline, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cptq("compare", "a", "b", "-o", "out").exit_code == 2
    (tmp_path / "out" / "mine.txt").write_text("")
    answer = cptq("compare", "a", "b", "-o", "out", "--overwrite")
    assert "was not written by cptq" in answer.stderr
    assert pipeline.seen == []


def test_strict_reaches_eval(cptq, pipeline) -> None:
    assert cptq("eval", "a", "--strict").exit_code == 0
    assert pipeline.seen[0].strict
