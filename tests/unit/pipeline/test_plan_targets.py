"""`cptq plan`: from an analysis to plans that `compress` takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cptq
from cptq.cli.app import app
from cptq.errors import PlanError
from cptq.pipeline.plan_targets import find_unit
from cptq.types import Plan
from tests.conftest import TinyModel
from tests.unit.allocation.synthetic import layer, unit

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
SMALL = {"calibration": "pydoc", "samples": 4, "seqlen": 32, "group_size": 16}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def analysis(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, short_manual: None
) -> Path:
    out = tmp_path_factory.mktemp("analysis") / "a"
    cptq.analyze(tiny_model("llama"), out=out, progress=print, device="cpu", **SMALL)
    return out


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "80"})
    return lambda *words: runner.invoke(app, ["plan", *map(str, words), "--device", "cpu"])


def test_several_targets_from_an_analysis(analysis: Path, plan: Callable[..., Result]) -> None:
    words = ("--target", "3bit", "--target", "4bit", "--explain", "layers.0.mlp.down", "-o", "p")
    found = plan(analysis, *words)
    assert found.exit_code == 0, found.output
    assert max(map(len, found.stdout.splitlines())) <= 80
    for title in ("Plans: knapsack", "Bits by role", "Size against predicted loss", f"{DOWN} at"):
        assert f"\n{title}" in f"\n{found.stdout}"
    assert "sensitivity:" not in found.stderr  # nothing was measured again
    small, large = (Plan.load(Path("p") / f"{target}.json") for target in ("3bit", "4bit"))
    assert small.predicted_bytes < large.predicted_bytes
    assert small.predicted_loss is not None
    assert large.predicted_loss is not None
    assert small.predicted_loss > large.predicted_loss
    data = json.loads(Path("p/plans.json").read_text())
    losses = [point["loss"] for point in data["view"]["front"]]
    sizes = [point["nbytes"] for point in data["view"]["front"]]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    svg = Path("p/front.svg").read_text()
    assert "3bit" in svg
    assert "<title" in svg


def test_an_edited_plan_is_counted_anew_and_carried_out(
    analysis: Path, plan: Callable[..., Result], tiny_model: TinyModel
) -> None:
    found = plan(analysis, "--target", "3bit", "--set", f"{DOWN}=8", "-o", "p", "--format", "quiet")
    assert found.exit_code == 0, found.output
    assert found.stdout.split() == ["p/3bit.json"]
    edited = Plan.load(Path("p/3bit.json"))
    assert edited.choices[DOWN].bits == 8
    assert any("set to" in note for note in edited.notes)
    options = {n: SMALL[n] for n in ("calibration", "samples", "seqlen")}
    made = cptq.compress(
        tiny_model("llama"), plan="p/3bit.json", out="out", progress=print, device="cpu", **options
    )
    assert made.artifact is not None
    assert made.artifact.weight_bytes == edited.predicted_bytes <= edited.budget.limit_bytes


def test_a_unit_is_found_by_its_name_a_layer_or_a_part_that_is_unique() -> None:
    spec = layer("model.layers.0.mlp.gate_proj", (4, 4))
    units = [unit("model.layers.0.mlp.gate_up", spec), unit("x.down", layer("x.down", (4, 4)))]
    for word in ("model.layers.0.mlp.gate_up", spec.name, "0.mlp.gate_up", "gate_proj"):
        assert find_unit(units, word) is units[0]
    with pytest.raises(PlanError, match="did you mean"):
        find_unit(units, "x.dwn")


def test_the_python_function_returns_the_plans(analysis: Path) -> None:
    found = cptq.plan_targets(analysis, targets=["3bit", "5bit"], progress=print, device="cpu")
    assert list(found.plans) == ["3bit", "5bit"]
    for planned in found.view.planned:
        assert planned.uniform_loss is not None
        assert planned.plan.predicted_bytes <= planned.plan.budget.limit_bytes
        assert planned.seconds is not None
        assert planned.seconds > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--explain", "down_proj"), r"part of the names of \d+ units"),
        (("--explain", "model.layers.0.mlp.dwn_proj"), rf"did you mean '{DOWN}'"),
        (("--set", f"{DOWN}=7"), "cannot have 7"),
        (("--set", DOWN), "UNIT=BITS"),
        (("--target", "1kB"), "below the smallest plan"),
        (("--metric", "cca"), "has no scores of 'cca'"),
        (("--explain", DOWN, "--allocator", "even"), "--explain needs scores"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    words: tuple[str, ...], message: str, analysis: Path, plan: Callable[..., Result]
) -> None:
    found = plan(analysis, *words)
    assert found.exit_code in (1, 2)
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(message, line)
