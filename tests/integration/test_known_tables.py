"""`analyze --sensitivity`: what an earlier analysis measured is not measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cptq.errors import PlanError
from cptq.pipeline import analyze
from cptq.report import AnalyzeOutcome
from tests.integration.test_analyze import quiet, settings

TinyModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("short_manual")


@pytest.fixture(scope="module")
def earlier(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis of a tiny llama by two metrics that read no text."""
    out = tmp_path_factory.mktemp("earlier") / "a"
    analyze(settings(tiny_model("llama"), out, "kurtosis", "pq-index"), quiet)
    return out


def again(model: Path, out: Path, *paths: Path, **more: Any) -> AnalyzeOutcome:
    asked = settings(model, out, *more.pop("metrics", ("kurtosis",)))
    return analyze(replace(asked, sensitivity=paths, **more), quiet)


@pytest.mark.parametrize("ending", ["", "sensitivity", "sensitivity/kurtosis.json"])
def test_known_tables_are_taken_over_and_the_rest_is_measured(
    tiny_model: TinyModel, earlier: Path, tmp_path: Path, ending: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    measured: list[str] = []
    module = import_module("cptq.pipeline.analyze")
    usual = module.measure

    def measure(*args: Any, **named: Any) -> Any:
        measured.extend(named["metrics"])
        return usual(*args, **named)

    monkeypatch.setattr(module, "measure", measure)
    found = again(
        tiny_model("llama"), tmp_path / "b", earlier / ending, metrics=("kurtosis", "cca")
    )
    assert measured == ["cca"]
    known = {"kurtosis"} if ending.endswith(".json") else {"kurtosis", "pq-index"}
    assert set(found.summary.sensitivity) == known | {"cca"}
    for name in known:
        first, second = (
            (place / "sensitivity" / f"{name}.json").read_bytes()
            for place in (earlier, tmp_path / "b")
        )
        assert first == second
    report = (tmp_path / "b" / "report.md").read_text()
    assert all(name in report for name in known)


def test_a_ranking_needs_no_text_where_all_is_known(
    tiny_model: TinyModel, earlier: Path, tmp_path: Path
) -> None:
    found = again(tiny_model("llama"), tmp_path / "b", earlier)
    assert isinstance(found, AnalyzeOutcome)
    assert found.summary.calibration is None


def test_what_does_not_fit_is_refused_by_name(
    tiny_model: TinyModel, earlier: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    with pytest.raises(PlanError, match=r"pq-index\.json|kurtosis\.json was measured on another"):
        again(tiny_model("opt"), out, earlier)
    with pytest.raises(PlanError, match=r"kurtosis\.json has no score for w3"):
        again(tiny_model("llama"), out, earlier, bits=(3, 16))
    with pytest.raises(PlanError, match="holds no sensitivity tables"):
        again(tiny_model("llama"), out, tmp_path)
    assert not out.exists()
