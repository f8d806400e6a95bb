"""The leak guard of a run: before anything is measured, the harness's documents included."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cptq.config import CompareSettings, EvalSettings, ModelSettings
from cptq.data.overlap import encode_sketch, sketch
from cptq.errors import DataError, EvaluationError
from cptq.evaluation import harness
from cptq.pipeline import compare, evaluate
from cptq.types import Event, Notice, Progress

TEXT = " ".join(f"Once upon a time there were {i} small cats and a warm sun." for i in range(80))
OTHER = " ".join(f"Nobody had counted the {i} windows of that grey old house." for i in range(80))


@pytest.fixture(scope="module")
def place(tiny_model: Callable[..., Path], tmp_path_factory) -> Path:
    """A dense model, an artifact that was calibrated on a.txt, and another text."""
    root = tmp_path_factory.mktemp("guard")
    for name in ("dense", "artifact"):
        shutil.copytree(tiny_model("llama"), root / name)
    manifest = {"calibration": {"origin": "a.txt", "sketch": encode_sketch(sketch([TEXT]))}}
    (root / "artifact" / "cptq.json").write_text(json.dumps(manifest))
    (root / "a.txt").write_text(TEXT)
    (root / "b.txt").write_text(OTHER)
    return root


class Heard(list[Event]):
    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def stages(self) -> set[str]:
        return {event.stage for event in self if isinstance(event, Progress)}


def settings(place: Path, *tasks: str, **more) -> EvalSettings:
    return EvalSettings(
        model=ModelSettings(model=str(place / "artifact"), device="cpu"),
        baseline=str(place / "dense"),
        tasks=tuple(f"text:{place / task}" for task in tasks),
        limit=4,
        seqlen=64,
        **more,
    )


def test_strict_refuses_before_the_baseline_and_the_first_task_are_measured(place: Path) -> None:
    heard = Heard()
    evaluate(settings(place, "b.txt", strict=True), heard)
    assert f"text:{place / 'b.txt'}" in heard.stages
    heard.clear()
    with pytest.raises(EvaluationError, match=r"a\.txt is measured on passages"):
        evaluate(settings(place, "b.txt", "a.txt", strict=True), heard)
    assert not heard.stages
    with pytest.raises(DataError):
        evaluate(settings(place, "b.txt", "none.txt", strict=True), heard)
    assert not heard.stages


def test_compare_is_as_strict(place: Path) -> None:
    asked = CompareSettings(
        model=ModelSettings(model=str(place / "dense"), device="cpu"),
        others=(str(place / "artifact"),),
        tasks=(f"text:{place / 'a.txt'}",),
        limit=4,
        seqlen=64,
        strict=True,
    )
    heard = Heard()
    with pytest.raises(EvaluationError, match="passages"):
        compare(asked, heard)
    assert not heard.stages


def documents(texts: list[str]) -> SimpleNamespace:
    """What the harness's task manager answers, as far as it is asked."""
    rows = [{"id": 7, "question": {"parts": [text]}, "image": object()} for text in texts]
    task = SimpleNamespace(eval_docs=rows)
    return SimpleNamespace(load=lambda names: {"tasks": dict.fromkeys(names, task)})


def test_the_documents_of_the_harness_are_looked_at(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"leaks": [OTHER[:400], TEXT[:1500]], "clean": [OTHER], "silent": ["", ""]}
    run = sys.modules["cptq.pipeline.evaluate"]  # the package has a function of that name
    monkeypatch.setattr(run, "run_harness", lambda *_: [])

    def notices(name: str, **more) -> list[str]:
        heard = Heard()
        answer = (documents(words[name]), [name])
        for module in (harness, run):
            monkeypatch.setattr(module, "resolve_tasks", lambda tasks: answer)
        evaluate(settings(place, "b.txt", lm_eval=(name,), **more), heard)
        return [n.message for n in heard if isinstance(n, Notice) and "lm-eval/" in n.subject]

    (warning,) = notices("leaks")
    assert "the calibration text a.txt: the result flatters" in warning
    assert notices("clean", strict=True) == []
    (skipped,) = notices("silent")
    assert skipped == "not compared with the calibration text: its documents hold no text"
    with pytest.raises(EvaluationError, match="lm-eval/leaks is measured on passages"):
        notices("leaks", strict=True)
