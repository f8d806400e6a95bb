"""`--sparsity` from the options to a verified artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.config import (
    AnalyzeSettings,
    CalibrationSettings,
    CompressSettings,
    ModelSettings,
    command_line,
    settings_from,
)
from cptq.errors import PlanError, UsageError
from cptq.inference.modules import find_packed_modules
from cptq.pipeline import analyze, compress
from cptq.types import Candidate, Event, Notice
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
TEXT = CalibrationSettings(calibration="pydoc", samples=12, seqlen=64, batch_size=4)
SPARSE = {"runtime": "cptq", "sparsity": ("2:4", "50%"), "bits": (3, 4, 16), "group_size": 16}


def common(model: Path) -> dict[str, Any]:
    return {"model": ModelSettings(model=str(model), device="cpu"), "calibration": TEXT}


def warnings(events: list[Event]) -> list[str]:
    return [e.message for e in events if isinstance(e, Notice) and e.kind == "warning"]


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", dtype=torch.float16, intermediate_size=80)


def test_a_budget_that_only_sparse_weights_reach(model: Path, tmp_path: Path) -> None:
    """2:4 at 3 bits takes fewer bytes than any dense width: the plan is sparse, and loads."""
    heard: list[Event] = []
    outcome = compress(
        CompressSettings(
            target="3.9bpw",
            refine=3,
            embedding_bits=16,
            out=tmp_path / "x",
            **common(model),
            **SPARSE,
        ),
        heard.append,
    )
    artifact, size = outcome.artifact, outcome.summary.size
    budget = outcome.summary.budget
    assert size is not None
    assert budget is not None
    assert artifact.weight_bytes == size.file_bytes
    assert size.count_bytes(budget.scope) <= budget.limit_bytes
    assert artifact.manifest["verification"]["max_abs_difference"] < 1e-4
    assert any("no plan without sparse weights is so small" in text for text in warnings(heard))
    schemes = [
        m.scheme for m in find_packed_modules(cptq.load(artifact.path, device="cpu")).values()
    ]
    assert {s.pattern for s in schemes} & {"2:4", "unstructured"}
    assert {line.candidate for line in outcome.summary.results if line.candidate.sparsity}


@pytest.mark.slow
def test_a_measurement_is_reused_and_names_what_it_lacks(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    analyze(
        AnalyzeSettings(metrics=("output",), out=out, **common(model), **SPARSE), lambda e: None
    )
    table = out / "sensitivity" / "output.json"
    row = next(iter(json.loads(table.read_text())["scores"].values()))
    assert list(row) == [
        "w3g16",
        "w3g16-2:4",
        "w3g16-s50",
        "w4g16",
        "w4g16-2:4",
        "w4g16-s50",
        "w16",
    ]
    asked = common(model) | SPARSE | {"sensitivity": table, "target": "3.75bpw"}
    asked |= {"check_uniform": False, "embedding_bits": 16}
    outcome = compress(CompressSettings(out=tmp_path / "x", **asked), lambda e: None)
    assert any(line.candidate.sparsity for line in outcome.summary.results)
    plan = tmp_path / "x" / "plan.json"
    again = CompressSettings(
        plan=plan, target=None, runtime="cptq", out=tmp_path / "y", **common(model)
    )
    compress(again, lambda e: None)
    first, second = ((tmp_path / n / "cptq.safetensors").read_bytes() for n in "xy")
    assert first == second
    asked["sparsity"] = ("75%",)
    with pytest.raises(PlanError, match=r"no score for w3g16-s75, w4g16-s75.*--sparsity"):
        compress(CompressSettings(out=tmp_path / "z", **asked), lambda e: None)


def test_validation_ranks_and_plans_with_them(model: Path, tmp_path: Path) -> None:
    settings = AnalyzeSettings(
        validate=True, pairs=24, targets=("3.7bit",), metrics=("kurtosis",), out=tmp_path / "x",
        **common(model), **SPARSE,
    )  # fmt: skip
    validation = analyze(settings, lambda e: None).summary.validation
    assert validation is not None
    assert {pair.candidate.pattern for pair in validation.pairs} == {"none", "2:4", "unstructured"}
    even = next(trial for trial in validation.trials if trial.metric is None)
    assert not any(choice.sparsity for choice in even.choices.values())


@pytest.mark.parametrize("kind", [AnalyzeSettings, CompressSettings])
def test_the_words_of_the_option(kind: type) -> None:
    line = {"model": "m", "runtime": "cptq", "sparsity": "2:4,50%"}
    settings = settings_from(kind, line)
    assert settings.sparsity == ("2:4", "50%")
    assert "--sparsity 2:4,50%" in command_line(settings)
    with pytest.raises(UsageError, match=r"transformers.*--sparsity"):
        settings_from(kind, {"model": "m", "sparsity": "2:4"})
    for word in ("0%", "100%", "4:4", "4:16", "half", "50", "5.5%"):
        with pytest.raises(
            UsageError, match=f"--sparsity holds '{word}'.*allowed: N:M such as 2:4"
        ):
            settings_from(kind, {**line, "sparsity": word})


def test_yaml_reads_2_4_as_a_number_and_that_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nruntime: cptq\nsparsity: [2:4]\n")
    with pytest.raises(UsageError, match=r"sparsity is 124.*in quotes"):
        settings_from(CompressSettings, {}, file)
    file.write_text("model: m\nruntime: cptq\nsparsity: ['2:4', 50%]\n")
    assert settings_from(CompressSettings, {}, file).sparsity == ("2:4", "50%")


def test_labels_are_those_of_the_field() -> None:
    found = [Candidate.parse(f"w4g64-{end}") for end in ("2:4", "s50")]
    assert [(c.sparsity, c.pattern) for c in found] == [(0.5, "2:4"), (0.5, "unstructured")]
