"""GPT-2 from `cptq analyze` to an artifact: its Conv1D layers are units like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cptq.config import AnalyzeSettings, CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import UsageError
from cptq.pipeline import analyze, compress
from cptq.sensitivity import list_default_metrics
from cptq.types import Event, Notice
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
TEXT = CalibrationSettings(calibration="pydoc", samples=12, seqlen=64, batch_size=4)
UNITS = 8  # four Conv1D in each of two blocks


def common(model: Path) -> dict[str, Any]:
    source = ModelSettings(model=str(model), device="cpu")
    return {"model": source, "calibration": TEXT, "bits": (2, 4, 8, 16), "group_size": 16}


@pytest.mark.slow
def test_all_metrics_then_a_plan_of_each(tiny_model: TinyModel, tmp_path: Path) -> None:
    asked, out = common(tiny_model("gpt2")), tmp_path / "analysis"
    heard: list[Event] = []
    analyze(AnalyzeSettings(metrics=list_default_metrics(), out=out, **asked), heard.append)
    layers = json.loads((out / "layers.json").read_text())
    assert len(layers["units"]) == UNITS + 1  # and the embedding, which is the head as well
    told = [e.message for e in heard if isinstance(e, Notice) and "--runtime" in e.subject]
    assert told == [
        f"{UNITS} Conv1D layers are measured, and stay dense except with --runtime llamacpp or cptq"
    ]
    for name in list_default_metrics():
        table = out / "sensitivity" / f"{name}.json"
        scores = json.loads(table.read_text())["scores"]
        wte = scores.pop("transformer.wte")
        assert len(scores) == UNITS
        coarse = [s for row in scores.values() for c, s in row.items() if c.startswith("w2")]
        assert len(coarse) == UNITS
        assert min(coarse) > 0, name
        assert wte["f8e4m3"] > 0
    outcome = compress(
        CompressSettings(
            sensitivity=out / "sensitivity" / "output.json", runtime="cptq", target="4bit",
            out=tmp_path / "small", **asked,
        ),
        lambda event: None,
    )  # fmt: skip
    assert outcome.artifact.manifest["verification"]["max_abs_difference"] < 1e-4
    assert len(outcome.summary.results) >= UNITS // 2
    assert all(line.name.startswith("transformer.") for line in outcome.summary.results)


def test_plans_for_a_runtime_that_takes_no_conv1d_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    asked = common(tiny_model("gpt2"))
    with pytest.raises(
        UsageError, match=r"keeps every layer of this model dense.*--runtime llamacpp or cptq"
    ):
        analyze(AnalyzeSettings(out=tmp_path / "x", validate=True, **asked), lambda event: None)
    assert list(tmp_path.iterdir()) == []


def test_validation_plans_for_the_runtime_that_is_named(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    settings = AnalyzeSettings(
        validate=True, pairs=6, targets=("4.5bit",), metrics=("kurtosis",), runtime="cptq",
        asymmetric=True, out=tmp_path / "x", **common(tiny_model("gpt2")),
    )  # fmt: skip
    validation = analyze(settings, lambda event: None).summary.validation
    assert validation is not None
    labels = {c.label for trial in validation.trials for c in trial.choices.values()}
    assert {"w2g16-asym", "w4g16-asym"} & labels
    assert all(trial.file_bytes <= trial.limit_bytes for trial in validation.trials)
