"""`--dry-run`, and what a run tells and refuses before it measures anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cptq
from cptq.artifact import atomic
from cptq.checkpoint.memory import BASE, Memory
from cptq.cli.app import app
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import ArtifactError, BudgetError, UsageError
from cptq.pipeline import inputs as inputs_module
from cptq.pipeline.disk import check_disk
from cptq.pipeline.estimate import Probe, _count_passes
from cptq.pipeline.inputs import load_inputs
from cptq.pipeline.recorder import Recorder
from cptq.report.estimate import DiskFacts, Estimate
from tests.conftest import Heard, TinyModel

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
SMALL = {"calibration": "pydoc", "samples": 4, "seqlen": 32, "group_size": 16, "device": "cpu"}
WORDS = [*("--calibration", "pydoc", "--samples", "4", "--seqlen", "32"), "--device", "cpu"]
WORDS += ["--group-size", "16", "--dry-run"]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "80"})
    return lambda *words: runner.invoke(app, ["compress", *map(str, words), *WORDS])


def keep_to(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(
        inputs_module,
        "choose_memory",
        lambda asked, folder, processes=1: Memory(total=total, folder=folder),
    )


def test_it_writes_nothing_and_fits_80_columns(
    tiny_model: TinyModel, dry_run: Callable[..., Result], tmp_path: Path
) -> None:
    found = dry_run(tiny_model("llama"), "--target", "4bit")
    assert found.exit_code == 0, found.output
    assert list(tmp_path.iterdir()) == []
    assert max(map(len, found.stdout.splitlines())) <= 80
    for title in ("Memory", "Disk of", "Time, estimated", "Stays in 16 bits", "Plan"):
        assert f"\n{title}" in found.stdout
    assert "no plan yet" in found.stdout
    assert "an estimate, scaled from" in found.stdout


def test_json_holds_the_same(tiny_model: TinyModel, dry_run: Callable[..., Result]) -> None:
    words = ("--allocator", "even", "--format", "json", "--max-shard-size", "8kB")
    found = dry_run(tiny_model("llama"), *words)
    data = json.loads(found.stdout)
    assert data["dry_run"] is True
    assert data["shard_bytes"] == 8000
    assert data["disk"]["need"] == sum(data["disk"][n] for n in ("output", "run", "spilled"))
    assert data["time"]["total"] == pytest.approx(sum(data["time"]["stages"].values()))
    assert data["plan"]["allocator"] == "even"
    assert data["roles"]


@pytest.mark.parametrize("given", ["even", "table", "plan"])
def test_the_plan_is_the_one_that_a_run_carries_out(
    given: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, options = tiny_model("llama"), dict[str, Any](SMALL, target="4bit", progress=print)
    if given == "even":
        options["allocator"] = "even"
    if given == "table":
        cptq.analyze(model, out=tmp_path / "a", **SMALL, progress=print)
        options["sensitivity"] = tmp_path / "a" / "sensitivity" / "output.json"
    if given == "plan":
        cptq.plan(model, **options).save(tmp_path / "plan.json")
        options = {**SMALL, "plan": tmp_path / "plan.json", "progress": print}
        del options["group_size"]
    found = cptq.estimate(model, out=tmp_path / "out", **options)
    made = cptq.compress(model, out=tmp_path / "out", check_uniform=False, **options)
    assert found.plan == made.summary.plan
    assert found.size == made.summary.size
    assert found.plan is not None
    assert found.plan.predicted_bytes == made.artifact.weight_bytes <= found.disk.output
    assert "measurement by output" not in found.time.stages


def test_an_output_that_is_there_is_not_in_the_way(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    found = cptq.estimate(tiny_model("llama"), out=out, progress=print, **SMALL)
    assert isinstance(found, Estimate)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_nothing_is_measured_or_compressed(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise AssertionError("a dry run measures and compresses nothing")

    compress = sys.modules["cptq.pipeline.compress"]
    for name in ("measure", "carry_out", "build_trial_model", "refine_plan", "draft"):
        monkeypatch.setattr(compress, name, refuse)
    options = dict(SMALL, refine=3, tune=True, allocator="even")
    found = cptq.estimate(tiny_model("llama"), out=tmp_path / "o", progress=heard.append, **options)
    assert "--refine" in found.time.left_out
    assert "--tune (at most 10 minutes)" in found.time.left_out
    assert heard.stages <= {"load", "tokenize", "calibration", "estimate"}


def test_what_makes_a_run_impossible_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        cptq.estimate(tiny_model("llama"), out=tmp_path / "o", **dict(SMALL, target="1kB"))
    with pytest.raises(UsageError, match="--max-memory 1,000,000 bytes"):
        cptq.estimate(tiny_model("llama"), out=tmp_path / "o", **SMALL, max_memory="1MB")


def test_dry_run_is_a_function_of_its_own() -> None:
    with pytest.raises(UsageError, match="dry_run"):
        cptq.compress("somewhere", dry_run=True)


def test_memory_is_told_where_it_does_not_hold_the_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    whole = cptq.estimate(model, out=out, progress=heard.append, **SMALL)
    assert whole.memory.held_whole
    assert not any("one block at a time" in message for message in heard.notices)
    keep_to(monkeypatch, BASE + 4_000)
    heard.clear()
    parts = cptq.estimate(model, out=out, progress=heard.append, **SMALL)
    assert not parts.memory.held_whole
    assert (parts.memory.weights, parts.memory.activations) == (
        1_333,
        0,
    )  # one layer takes the rest
    assert parts.disk.spilled > 0 == whole.disk.spilled
    (told,) = [message for message in heard.notices if "one block at a time" in message]
    assert "within 600 MB; activations go to" in told
    assert ".out.cptq-run" in told


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_a_run_that_the_disk_cannot_hold_is_refused_before_any_measurement(
    command: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_to(monkeypatch, BASE)
    estimated = cptq.estimate(tiny_model("llama"), out=tmp_path / "out", **SMALL)
    free = estimated.disk.output + atomic._MARGIN
    monkeypatch.setattr(atomic, "count_free_bytes", lambda directory: free)
    events: list[Any] = []
    options = dict(SMALL, samples=64, progress=events.append)
    with pytest.raises(ArtifactError) as caught:
        getattr(cptq, command)(tiny_model("llama"), out=tmp_path / "out", **options)
    words = str(caught.value)
    assert f"{free:,} are free" in words
    assert "for activations that wait" in words
    assert "--max-memory" in words
    assert not any(getattr(event, "stage", "") == "sensitivity" for event in events)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_kept_need_no_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "count_free_bytes", lambda directory: 100 + atomic._MARGIN)
    facts = DiskFacts(place=Path("out"), output=60, run=50, spilled=0, free=0)
    check_disk(facts, kept=10)
    check_disk(facts, kept=500)
    with pytest.raises(ArtifactError, match="60 for the output, 41 for finished steps"):
        check_disk(facts, kept=9)


def test_a_probe_is_scaled_by_the_work_that_it_was_for() -> None:
    probe = Probe(positions=10, width=4, out=2, forward=5.0, moment=8.0, rounding=96.0)
    assert (probe.per_position, probe.per_square, probe.per_cube) == (0.5, 0.05, 1.0)


def test_less_memory_takes_more_passes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_passes(total: int, **more: Any) -> float:
        keep_to(monkeypatch, total)
        given = CompressSettings(
            model=ModelSettings(model=str(tiny_model("llama"))),
            calibration=CalibrationSettings(calibration="pydoc", samples=4, seqlen=32),
            out=tmp_path / "o",
            **more,
        )
        inputs = load_inputs(given, Recorder(print), writes=False)
        return _count_passes(inputs, inputs.calibration.batches)

    assert list_passes(2 * BASE) == 1  # qkv, o, gate_up, down: four units in a block
    assert list_passes(BASE) == 5
    assert list_passes(BASE, compressor="gptq") == 2
