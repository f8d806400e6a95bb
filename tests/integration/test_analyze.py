"""What `cptq analyze` leaves: tables with and without text, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cptq.config import AnalyzeSettings, CalibrationSettings, ModelSettings
from cptq.pipeline import analyze
from cptq.pipeline.files import read_table
from cptq.sensitivity import list_default_metrics
from cptq.types import Event, Notice

TinyModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=12, seqlen=128, batch_size=4)


def settings(model: Path, out: Path, *metrics: str, **more: Any) -> AnalyzeSettings:
    return AnalyzeSettings(
        model=ModelSettings(model=str(model)),
        calibration=CALIBRATION,
        metrics=metrics,
        bits=(2, 4, 16),
        group_size=16,
        out=out,
        **more,
    )


def quiet(_event: Event) -> None: ...


def test_metrics_of_the_weights_alone_read_no_text(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("bert"), tmp_path / "out"
    missing = CalibrationSettings(calibration=str(tmp_path / "absent.txt"))
    found = settings(model, out, "kurtosis", "pq-index")
    outcome = analyze(replace(found, calibration=missing), quiet)
    assert outcome.summary.calibration is None
    assert not (out / "calibration.json").exists()
    assert "weights only" in (out / "report.md").read_text()
    table = read_table(out / "sensitivity" / "kurtosis.json", outcome.summary.model.fingerprint)
    assert table.scores == outcome.summary.sensitivity["kurtosis"].scores


def test_all_says_what_it_leaves_out_and_reports_pruning(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = analyze(settings(tiny_model("llama"), out, *list_default_metrics()), quiet)
    assert list(outcome.summary.sensitivity) == list(list_default_metrics())
    said = [n for n in outcome.summary.notices if n.subject == "--metric all"]
    assert [(n.kind, "--metric kl" in n.message) for n in said] == [("info", True)]
    report = (out / "report.md").read_text()
    assert "essential sparsity" in report
    assert "Units pruned one at a time" in report
    assert {path.stem for path in (out / "sensitivity").iterdir()} == set(list_default_metrics())


def test_one_metric_is_not_taken_for_all(tiny_model: TinyModel, tmp_path: Path) -> None:
    events: list[Event] = []
    analyze(settings(tiny_model("llama"), tmp_path / "out", "kurtosis"), events.append)
    assert not [e for e in events if isinstance(e, Notice) and e.subject == "--metric all"]
