from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cptq.config import CompareSettings, EvalSettings, ModelSettings
from cptq.errors import EvaluationError, OutputExistsError, UsageError
from cptq.pipeline import compare, evaluate
from cptq.report.comparison import CompareOutcome
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _results(place: Path) -> None:
    """two.json: what `cptq eval` wrote about the model two."""
    evaluate(
        EvalSettings(
            model=ModelSettings(model=str(place / "two"), device="cpu"),
            tasks=(f"text:{place / 'a.txt'}",),
            limit=20,
            seqlen=64,
            out=place / "two.json",
        ),
        lambda event: None,
    )


def settings(place: Path, *names: str, **more) -> CompareSettings:
    first, *others = (str(place / name) for name in names)
    return CompareSettings(
        model=ModelSettings(model=first, device="cpu"),
        others=tuple(others),
        tasks=(f"text:{place / 'a.txt'}",),
        limit=20,
        seqlen=64,
        no_footprint=True,
        **more,
    )


def run(asked: CompareSettings) -> CompareOutcome:
    return compare(asked, lambda event: None)


def test_a_model_and_its_results_are_the_same(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(settings(place, "one", "two", "two.json", out=out)).comparison
    one, two, again = found.models
    assert [m.name for m in found.models] == ["one", "two", "two.json"]
    assert two.results[0].value == again.results[0].value != one.results[0].value
    assert (
        two.weight_bytes == again.weight_bytes == (place / "two/model.safetensors").stat().st_size
    )
    assert two.paired == again.paired != ()
    assert two.paired[0].difference == pytest.approx(two.results[0].value - one.results[0].value)
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.html", "front.svg"}
    assert json.loads((out / "compare.json").read_text())["models"][1]["paired"]
    with pytest.raises(OutputExistsError):
        run(settings(place, "one", "two.json", out=out))
    run(settings(place, "one", "two.json", out=out, overwrite=True))


def test_the_baseline_of_eval_is_compared_on_the_same_windows(place: Path) -> None:
    asked = EvalSettings(
        model=ModelSettings(model=str(place / "two"), device="cpu"),
        baseline=str(place / "one"),
        tasks=(f"text:{place / 'a.txt'}",),
        limit=20,
        seqlen=64,
    )
    summary = evaluate(asked, lambda event: None).summary
    both = {(row.task, row.metric) for row in summary.baseline}  # KL has no twin
    wanted = [row.metric for row in summary.evaluation if (row.task, row.metric) in both]
    assert [row.metric for row in summary.paired] == wanted
    assert "perplexity" in wanted
    assert summary.paired[0].samples == 20
    told = summary.to_dict()["paired"][0]
    assert told["verdict"] == summary.paired[0].verdict
    short = run(settings(place, "one", "two")).comparison
    assert short.models[1].paired[0] == summary.paired[0]


def test_other_samples_are_not_compared_and_that_is_said(place: Path) -> None:
    found = run(replace(settings(place, "one", "two.json"), limit=10)).comparison
    assert found.models[1].paired == ()
    assert any((n.kind, n.subject) == ("skipped", "two") for n in found.notices)


def test_what_cannot_be_compared_says_why(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "x.json"
    for content in ("{", "[]", '{"model": {}, "evaluation": []}'):
        broken.write_text(content)
        with pytest.raises(EvaluationError, match=r"x\.json"):
            run(settings(place, "one", str(broken)))
    other = json.loads((place / "two.json").read_text())
    for row in other["evaluation"]:
        row["task"] = "wikitext"
    broken.write_text(json.dumps(other))
    with pytest.raises(EvaluationError, match="wikitext"):
        run(settings(place, "two.json", str(broken)))
    with pytest.raises(UsageError):
        settings(place, "one")
    with pytest.raises(UsageError):
        settings(place, "one", "one")


def test_an_artifact_on_its_calibration_text(place: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "made"
    shutil.copytree(place / "artifact", artifact)
    asked = settings(place, "one", str(artifact))
    found = run(asked).comparison
    (warning,) = [notice for notice in found.notices if notice.kind == "warning"]
    assert "a.txt" in warning.message
    with pytest.raises(EvaluationError, match=r"a\.txt"):
        run(replace(asked, strict=True))
    manifest = {"calibration": {"origin": "a.txt", "sketch": ""}}
    (artifact / "cptq.json").write_text(json.dumps(manifest))
    notices = run(asked).comparison.notices
    assert any((n.kind, n.subject) == ("skipped", "made") for n in notices)


def test_the_protocol_that_is_asked_for_is_that_of_every_model(place: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(place / name, tmp_path / name)
        tiny_tokenizer(causal=True, bos=True).save_pretrained(tmp_path / name)
    asked = replace(
        settings(place, "one", "two", bos="first"),
        model=ModelSettings(model=str(tmp_path / "one"), device="cpu"),
        others=(str(tmp_path / "two"),),
    )
    protocols = [model.results[0].protocol for model in run(asked).comparison.models]
    assert protocols == ["windows: 20 of 64 tokens, BOS in the first only"] * 2
    protocols = [m.results[0].protocol for m in run(replace(asked, bos="every")).comparison.models]
    assert protocols == ["windows: 20 of 64 tokens, BOS in each"] * 2
