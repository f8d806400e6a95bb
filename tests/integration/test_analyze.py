"""What `cptq analyze` leaves: tables without text, and partial ones after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cptq.config import AnalyzeSettings, CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import PlanError
from cptq.pipeline import analyze, compress
from cptq.pipeline.files import read_table
from cptq.sensitivity import list_default_metrics
from cptq.types import Event, Notice

TinyModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=12, seqlen=128, batch_size=4)
#: the command line with trials that take long enough to be interrupted, and a line at each
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.cli.app import main
whole = DivergenceFromDense.measure_unit
def slow(self, unit, weights):
    print("trial", file=sys.stderr, flush=True)
    time.sleep(0.02)
    return whole(self, unit, weights)
DivergenceFromDense.measure_unit = slow
main()
"""


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


@pytest.fixture(scope="module")
def interrupted(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A real `cptq analyze` that gets SIGINT at its fortieth trial: model, output, what it said."""
    model = tiny_model("llama", num_hidden_layers=8)
    out = tmp_path_factory.mktemp("interrupted") / "out"
    line = [sys.executable, "-c", SLOW, "analyze", str(model), "--metric", "pruning"]
    line += ["--metric", "kl", "--metric", "kurtosis", "--calibration", "pydoc", "--samples", "12"]
    line += ["--seqlen", "64", "--group-size", "16", "--bits", "2,4,16", "-o", str(out)]
    process = subprocess.Popen(
        [*line, "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    said, trials = "", 0
    for words in process.stderr:
        said += words
        trials += words == "trial\n"
        if trials == 40:
            process.send_signal(signal.SIGINT)
            break
    stdout, rest = process.communicate(timeout=300)
    return model, out, subprocess.CompletedProcess(line, process.returncode, stdout, said + rest)


def test_ctrl_c_keeps_what_was_measured(
    interrupted: tuple[Path, Path, subprocess.CompletedProcess[str]],
) -> None:
    _, out, run = interrupted
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    report = json.loads((out / "report.json").read_text())
    tables = {name: report["sensitivity"][name] for name in ("pruning", "kl", "kurtosis")}
    units = [unit["name"] for unit in report["units"]]
    done = len(tables["kl"]["scores"])
    assert 1 < done < len(units)
    sentence = f"interrupted; {done} of {len(units)} units were measured and are kept in {out}"
    assert f"Error: {sentence}" in run.stderr.replace("\n", " ")
    assert json.loads(run.stdout)["error"]["message"] == sentence
    for name, table in tables.items():
        file = out / "sensitivity" / f"{name}.partial.json"
        assert json.loads(file.read_text())["scores"] == table["scores"]
        assert list(table["scores"]) == list(table["per_unit"]) == units[:done]
        assert table["details"]["partial"] == {"units": done, "of": len(units)}
        assert not file.with_name(f"{name}.json").exists()
    assert any("no plan is made from them" in notice["message"] for notice in report["notices"])
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def test_no_plan_is_made_from_a_partial_table(
    interrupted: tuple[Path, Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    model, out, _ = interrupted
    table = out / "sensitivity" / "kl.partial.json"
    with pytest.raises(PlanError, match=r"kl\.partial\.json is a partial measurement") as refused:
        compress(
            CompressSettings(
                model=ModelSettings(model=str(model)),
                calibration=CALIBRATION,
                sensitivity=table,
                out=tmp_path / "small",
            ),
            quiet,
        )
    assert "let cptq analyze run to its end" in str(refused.value)
    renamed = tmp_path / "kl.json"  # what it is called does not matter
    renamed.write_bytes(table.read_bytes())
    with pytest.raises(PlanError, match="partial measurement"):
        read_table(renamed, json.loads((out / "layers.json").read_text())["model_fingerprint"])


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
