"""Plans made, fixed by hand, refined, edited, replayed, and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cptq.artifact.inspect import inspect
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import BudgetError, CalibrationError, PlanError
from cptq.pipeline import compress
from cptq.types import Event, Notice
from tests.conftest import TinyModel
from tests.quick import keep_quick

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)


def quiet(_event: Event) -> None: ...


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


def settings(model: Path, out: Path, **more: Any) -> CompressSettings:
    wanted: dict[str, Any] = {
        "calibration": CALIBRATION, "group_size": 16, "compressor": "nearest",
        "check_uniform": False, "embedding_bits": 16, "scales": "16bit",
    }  # fmt: skip
    return CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a first run, which no test changes."""
    first = tmp_path_factory.mktemp("plans") / "first"
    compress(settings(model, first, target="3bit"), quiet)
    return first / "sensitivity" / "output.json"


def test_pins_and_limits_are_obeyed_and_the_budget_still_holds(model: Path, tmp_path: Path) -> None:
    outcome = compress(
        settings(
            model, tmp_path / "a", target="4.5bit",
            pins=(r"layers\.0.*down=8bit",), min_bits=("qkv=4", "3"), max_bits=("6",),
        ),
        quiet,
    )  # fmt: skip
    plan = outcome.summary.plan
    assert plan is not None
    for unit, choice in plan.choices.items():
        if unit == "model.layers.0.mlp.down_proj":
            assert choice.bits == 8
        else:
            assert (4 if "qkv" in unit else 3) <= choice.bits <= 6, unit
    assert (tmp_path / "a" / "model.safetensors").stat().st_size <= plan.budget.limit_bytes


def test_a_pin_that_the_budget_cannot_hold_is_refused_before_the_work(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="type --target"):
        compress(settings(model, tmp_path / "a", target="2.5bit", pins=("layers=8bit",)), quiet)
    assert not (tmp_path / "a").exists()


def test_an_edited_plan_replays_exactly(model: Path, measured: Path, tmp_path: Path) -> None:
    plan = json.loads((measured.parents[1] / "plan.json").read_text())
    unit = "model.layers.1.mlp.down_proj"
    plan["choices"][unit] = "w5g16" if plan["choices"][unit] != "w5g16" else "w6g16"
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(plan))
    compress(settings(model, tmp_path / "b", target=None, plan=edited), quiet)
    assert sha256(tmp_path / "b") != sha256(measured.parents[1])
    again = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert again["choices"] == plan["choices"]
    # and the plan that the edited one wrote gives the same bytes once more
    written = tmp_path / "b" / "plan.json"
    compress(settings(model, tmp_path / "c", target=None, plan=written), quiet)
    assert sha256(tmp_path / "c") == sha256(tmp_path / "b")


def test_a_target_in_bits_per_weight_limits_the_weights_and_an_old_plan_of_it_replays(
    model: Path, tmp_path: Path
) -> None:
    outcome = compress(settings(model, tmp_path / "a", target="5.5bpw"), quiet)
    plan, size = outcome.summary.plan, outcome.summary.size
    assert plan is not None
    assert size is not None
    assert plan.budget.scope == "weights"
    assert size.compressible_bytes <= plan.budget.limit_bytes < size.file_bytes
    assert size.effective_bits <= 5.5
    for text in ((tmp_path / "a" / "README.md").read_text(), inspect_target(tmp_path / "a")):
        assert "5.5bpw" in text
        assert f"{plan.budget.limit_bytes:,} bytes of compressible weights" in text
    # plan.json of before budgets had a scope: the limit was a bound of the whole file
    data = json.loads((tmp_path / "a" / "plan.json").read_text())
    data["budget"] = {"limit_bytes": size.file_bytes + 100, "asked": "5.5bpw"}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data))
    compress(settings(model, tmp_path / "b", target=None, plan=old), quiet)
    assert sha256(tmp_path / "b") == sha256(tmp_path / "a")
    written = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert written["budget"] == data["budget"] | {"scope": "file"}
    assert f"{size.file_bytes + 100:,} bytes" in inspect_target(tmp_path / "b")


def inspect_target(folder: Path) -> str:
    return inspect(folder).provenance["target"]


def test_an_artifact_of_before_scopes_is_inspected(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured.parents[1], tmp_path / "a")
    path = tmp_path / "a" / "cptq.json"
    manifest = json.loads(path.read_text())
    assert manifest["plan"]["budget"].pop("scope") == "file"
    path.write_text(json.dumps(manifest))
    assert inspect_target(tmp_path / "a").endswith(" bytes")


def test_a_table_without_a_candidate_asked_for_is_refused_by_name(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    wrong = settings(model, tmp_path / "x", sensitivity=measured, bits=(3, 7, 8))
    with pytest.raises(PlanError) as caught:
        compress(wrong, quiet)
    assert "output.json has no score for w7g16" in str(caught.value)
    assert "--bits 2,3,4,5,6,8,16 --group-size 16" in str(caught.value)
    wrong = settings(model, tmp_path / "x", sensitivity=measured, group_size=48)
    with pytest.raises(PlanError, match=r"has no score for w2g48, .*--group-size 16"):
        compress(wrong, quiet)
    assert not (tmp_path / "x").exists()


def test_a_table_of_an_unknown_metric_is_refused(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    data = json.loads(measured.read_text()) | {"metric": "guess"}
    other = tmp_path / "guess.json"
    other.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"guess\.json was measured by 'guess', which this cptq"):
        compress(settings(model, tmp_path / "x", sensitivity=other), quiet)


def test_weights_that_changed_make_a_measurement_foreign(
    tiny_model: TinyModel, measured: Path, tmp_path: Path
) -> None:
    other = tiny_model("llama", seed=7)
    with pytest.raises(PlanError, match=r"output\.json was measured on another model"):
        compress(settings(other, tmp_path / "x", sensitivity=measured), quiet)


def misleading(measured: Path, place: Path) -> Path:
    """A table that calls one unit priceless and all others worthless."""
    data = json.loads(measured.read_text())
    for unit, row in data["scores"].items():
        for label in row:
            bits = int(label[1:].partition("g")[0])
            row[label] = 100.0 / bits if unit == "model.layers.1.mlp.down_proj" else 0.0
    place.write_text(json.dumps(data))
    return place


def test_a_plan_that_loses_to_uniform_is_not_shipped(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    heard: list[Event] = []
    table = misleading(measured, tmp_path / "bad.json")
    asked = settings(
        model, tmp_path / "a", sensitivity=table, target="3bit", check_uniform=True,
        compressor="gptq",
    )  # fmt: skip
    outcome = compress(asked, heard.append)
    told = [e for e in heard if isinstance(e, Notice) and e.subject == "--check-uniform"]
    assert [notice.kind for notice in told] == ["warning"]
    assert "loses to uniform w3g16 at the same bytes" in told[0].message
    assert {row.candidate.label for row in outcome.summary.results} == {"w3g16"}
    # what is shipped is, to the byte, what uniform ships
    plain = settings(model, tmp_path / "b", allocator="uniform", target="3bit", compressor="gptq")
    compress(plain, quiet)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    # and without the check the plan is carried out as it is
    alone = settings(model, tmp_path / "c", sensitivity=table, target="3bit", compressor="gptq")
    bad = compress(alone, quiet)
    assert len({row.candidate.label for row in bad.summary.results}) > 1


def test_a_plan_that_wins_is_shipped_as_without_the_check(model: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    asked = settings(model, tmp_path / "a", target="2.6bit", check_uniform=True, metric="kl")
    compress(asked, heard.append)
    told = [e for e in heard if isinstance(e, Notice) and e.subject == "--check-uniform"]
    assert [notice.kind for notice in told] == ["info"]
    assert "the mixed plan is kept" in told[0].message
    compress(settings(model, tmp_path / "b", target="2.6bit", metric="kl"), quiet)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_without_text_to_judge_on_the_check_is_left_out_and_that_is_said(
    model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("\n".join(f"Line {k} tells of the number {k * k}." for k in range(60)))
    heard: list[Event] = []
    short = CalibrationSettings(calibration=str(text), samples=1000, seqlen=32)
    compress(
        settings(model, tmp_path / "a", target="2.5bit", check_uniform=True, calibration=short),
        heard.append,
    )
    told = [e for e in heard if isinstance(e, Notice) and e.subject == "--check-uniform"]
    assert "no text is left beside what calibrates" in told[0].message
    with pytest.raises(CalibrationError, match="leaves 0 samples to judge with, and 2 are needed"):
        compress(settings(model, tmp_path / "b", refine=3, calibration=short), quiet)


@pytest.mark.parametrize("compressor", keep_quick(("nearest", "gptq"), "gptq"))
def test_refinement_mends_a_misled_plan_within_the_same_bytes(
    model: Path, measured: Path, tmp_path: Path, compressor: str
) -> None:
    table = misleading(measured, tmp_path / "bad.json")
    outcome = compress(
        settings(
            model, tmp_path / compressor, sensitivity=table, target="3bit", refine=25,
            compressor=compressor,
        ),
        quiet,
    )  # fmt: skip
    plan = outcome.summary.plan
    assert plan is not None
    note = plan.notes[-1]
    assert note.startswith("refined: ")
    assert "swaps kept" in note
    words = note.split()
    before, after = (float(words[words.index("to") + shift]) for shift in (-1, 1))
    assert after < before
    size = (tmp_path / compressor / "model.safetensors").stat().st_size
    assert size == plan.predicted_bytes <= plan.budget.limit_bytes
