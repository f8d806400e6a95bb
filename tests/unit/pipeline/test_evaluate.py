"""`cptq eval`: everything is prepared and checked before anything is measured."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptq.config import CompareSettings, EvalSettings, ModelSettings
from cptq.errors import CptqError, DataError, EvaluationError, UnknownNameError
from cptq.evaluation.tasks import harness
from cptq.inference.native.library import has_library
from cptq.inference.operations import is_exact
from cptq.pipeline import compare, evaluate
from cptq.report.render import render_json, render_markdown
from cptq.types import Notice
from tests.unit.inference.compressed_builders import write_compressed
from tests.unit.pipeline.conftest import OTHER, TEXT


def settings(place: Path, *tasks: str, **more) -> EvalSettings:
    return EvalSettings(
        model=ModelSettings(model=str(place / "artifact"), device="cpu"),
        baseline=str(place / "one"),
        tasks=tuple(f"text:{place / task}" if task.endswith(".txt") else task for task in tasks),
        limit=4,
        seqlen=64,
        **more,
    )


def test_strict_refuses_before_the_baseline_and_the_first_task_are_measured(
    place: Path, heard
) -> None:
    evaluate(settings(place, "b.txt", strict=True), heard)
    assert {"load", f"text:{place / 'b.txt'}"} < heard.stages
    heard.clear()
    with pytest.raises(EvaluationError, match=r"a\.txt"):
        evaluate(settings(place, "b.txt", "a.txt", strict=True), heard)
    assert heard.stages == {"prepare"}


def test_without_strict_a_leak_is_a_warning(place: Path, heard) -> None:
    found = evaluate(settings(place, "a.txt"), heard)
    assert found.summary.evaluation
    (warning,) = [event for event in heard if getattr(event, "kind", "") == "warning"]
    assert warning.subject == f"text:{place / 'a.txt'}"
    assert "a.txt" in warning.message


@pytest.mark.skipif(not has_library(), reason="needs the C library, which has to be compiled")
def test_activations_are_exact_unless_8_bits_are_asked_for(
    place: Path, tmp_path: Path, heard
) -> None:
    found, packed = {}, tmp_path / "packed"
    write_compressed(place / "one", packed)
    for kind in ("exact", "8bit"):
        heard.clear()
        asked = settings(place, "b.txt", activations=kind)
        model = replace(asked.model, model=str(packed))
        summary = evaluate(replace(asked, model=model), heard).summary
        assert summary.activations == kind
        assert f"| activations | {kind} |" in render_markdown(summary)
        found[kind] = {r.metric: r.value for r in summary.evaluation}
        said = [e for e in heard if isinstance(e, Notice) and "activations" in e.message]
        notices = {(notice.subject, notice.kind) for notice in said}
        expected = {(str(place / "one"), "skipped"), (str(packed), "info")}
        assert notices == (expected if kind == "8bit" else set())
    assert found["exact"].keys() == found["8bit"].keys()
    assert found["exact"] != found["8bit"]
    assert is_exact()  # as it was, by CPTQ_EXACT


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("none.txt", DataError),
        ("wikitexts", UnknownNameError),
        ("glue/sst2", EvaluationError),  # for a classifier
        ("ptb", DataError),  # there is no data
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_errors_in_a_task_come_before_any_model_is_loaded(
    place: Path, heard, monkeypatch: pytest.MonkeyPatch, task: str, error: type[CptqError], strict
) -> None:
    monkeypatch.setenv("CPTQ_DATA", str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    with pytest.raises(error):
        evaluate(settings(place, "b.txt", task, strict=strict), heard)
    assert heard.stages == {"prepare"}


def test_a_task_that_the_second_model_cannot_do_is_found_before_the_first_is_measured(
    place: Path, heard, tiny_model
) -> None:
    asked = CompareSettings(
        model=ModelSettings(model=str(place / "one"), device="cpu"),
        others=(str(tiny_model("bert")),),
        tasks=(f"text:{place / 'b.txt'}",),
    )
    with pytest.raises(EvaluationError, match="classifier"):
        compare(asked, heard)
    assert "load" not in heard.stages


def test_compare_is_as_strict(place: Path, heard) -> None:
    asked = CompareSettings(
        model=ModelSettings(model=str(place / "one"), device="cpu"),
        others=(str(place / "artifact"),),
        tasks=(f"text:{place / 'a.txt'}",),
        limit=4,
        seqlen=64,
        strict=True,
    )
    with pytest.raises(EvaluationError, match=r"a\.txt"):
        compare(asked, heard)
    assert heard.stages == {"prepare"}


def documents(texts: list[str]) -> SimpleNamespace:
    """What the harness's task manager answers, as far as it is asked."""
    rows = [{"id": 7, "question": {"parts": [text]}, "image": object()} for text in texts]
    task = SimpleNamespace(eval_docs=rows)
    return SimpleNamespace(load=lambda names: {"tasks": dict.fromkeys(names, task)})


def test_the_documents_of_the_harness_are_checked(
    place: Path, monkeypatch: pytest.MonkeyPatch, heard
) -> None:
    texts = {"leaks": [OTHER[:400], TEXT[:1500]], "clean": [OTHER], "silent": ["", ""]}
    pipeline = sys.modules["cptq.pipeline.evaluate"]  # the package has a function of that name
    monkeypatch.setattr(harness.PreparedHarness, "measure", lambda *_: [])

    def notices(name: str, **more) -> list[Notice]:
        heard.clear()
        answer = (documents(texts[name]), [name])
        for module in (harness, pipeline):
            monkeypatch.setattr(module, "resolve_tasks", lambda tasks: answer)
        evaluate(settings(place, "b.txt", lm_eval=(name,), **more), heard)
        return [n for n in heard if isinstance(n, Notice) and "lm-eval/" in n.subject]

    (warning,) = notices("leaks")
    assert warning.kind == "warning"
    assert "a.txt" in warning.message
    assert notices("clean", strict=True) == []
    (skipped,) = notices("silent")
    assert skipped.kind == "skipped"
    with pytest.raises(EvaluationError, match="lm-eval/leaks"):
        notices("leaks", strict=True)


def test_a_perplexity_on_the_calibration_corpus_is_marked(place: Path, heard) -> None:
    """In the results, the tables and the JSON; not the baseline's, which nothing calibrated."""
    manifest = json.loads((place / "artifact" / "cptq.json").read_text())
    folder = place / "marked"
    shutil.copytree(place / "artifact", folder)
    manifest["calibration"]["source"] = "pydoc"
    (folder / "cptq.json").write_text(json.dumps(manifest))
    asked = replace(
        settings(place, "pydoc", "b.txt"), model=ModelSettings(model=str(folder), device="cpu")
    )
    summary = evaluate(asked, heard).summary
    assert {r.task for r in summary.evaluation if r.in_domain} == {"pydoc"}
    assert {r.task for r in summary.evaluation if not r.in_domain} == {f"text:{place / 'b.txt'}"}
    assert not any(r.in_domain for r in summary.baseline)
    assert "in-domain" in render_markdown(summary)
    told = json.loads(render_json(summary))["evaluation"][0]
    assert told["in_domain"] is True
    assert told["protocol"] == "windows: 4 of 64 tokens, no BOS"


def test_a_directory_gets_all_reports_and_a_json_name_one_file(
    place: Path, tmp_path: Path, heard
) -> None:
    both = [
        evaluate(settings(place, "b.txt", out=tmp_path / name), heard) for name in ("d", "e.json")
    ]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        *("report.html", "report.json", "report.md")
    ]
    assert both[0].reports["html"] == tmp_path / "d" / "report.html"
    assert both[1].reports == {"json": tmp_path / "e.json"}
    texts = [(tmp_path / name).read_text() for name in ("d/report.json", "e.json")]
    values = [[row["value"] for row in json.loads(text)["evaluation"]] for text in texts]
    assert values[0] == values[1]
    with pytest.raises(CptqError, match="--overwrite"):
        evaluate(settings(place, "b.txt", out=tmp_path / "d"), heard)
