"""`cptq analyze` that dies at any moment, and goes on to the very same bytes."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.config import AnalyzeSettings
from cptq.errors import OutputExistsError, ResumeError
from cptq.pipeline import analyze
from cptq.types import Event, Notice, Progress
from tests.integration.forks import TEXT, Forks, place_text_beside
from tests.integration.test_analyze import quiet, settings
from tests.integration.test_resume_way import (
    find_run,
    kill_at_random_times,
    list_steps,
    send_at,
)

TinyModel = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("short_manual")


def sha256_of(folder: Path) -> dict[str, str]:
    """The digests of all files but the reports, which hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("report.")
    }


def die_at(stage: str, done: int) -> Callable[[Event], None]:
    """Return what to emit to, which ends the run at some progress."""

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.done) == (stage, done):
            raise KeyboardInterrupt

    return stop


def resume_after(wanted: AnalyzeSettings, moments: list[tuple[str, int]]) -> None:
    """Let a run die at these moments, one after the other, and end."""
    again = wanted
    for moment in moments:
        with pytest.raises(KeyboardInterrupt):
            analyze(again, die_at(*moment))
        assert not wanted.out.exists()  # type: ignore[union-attr]
        again = replace(wanted, resume=True)
    analyze(again, quiet)


def test_a_run_that_died_measures_no_unit_twice_and_writes_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[str] = []
    measure = DivergenceFromDense.measure_unit

    def count(self: Any, unit: Any, weights: Any) -> float:
        trials.append(unit.name)
        return measure(self, unit, weights)

    monkeypatch.setattr(DivergenceFromDense, "measure_unit", count)
    (tmp_path / "text.txt").write_text(TEXT)
    usual = settings(tiny_model("llama"), tmp_path / "whole" / "out", "pruning")
    text = replace(usual.calibration, calibration=str(tmp_path / "text.txt"), seqlen=32, samples=8)
    usual = replace(usual, calibration=text)
    analyze(usual, quiet)
    whole = sorted(trials)
    trials.clear()
    resumed = replace(usual, out=tmp_path / "resumed" / "out")
    resume_after(resumed, [("sensitivity", 5), ("essential sparsity", 3)])
    assert sorted(trials) == whole
    assert sha256_of(tmp_path / "resumed") == sha256_of(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["out"]
    with pytest.raises(OutputExistsError):
        analyze(usual, quiet)


def test_what_differs_is_refused_by_name_and_a_damaged_step_is_made_again(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    usual = settings(tiny_model("llama"), out, "kurtosis")
    with pytest.raises(KeyboardInterrupt):
        analyze(usual, die_at("sensitivity", 5))
    assert list_steps(out) == ["run", *(f"unit-{place}" for place in range(5))]
    for other, told in (
        ({}, "add --resume to go on from them"),
        ({"resume": True, "group_size": 8}, "begun with --group-size 16, this run says"),
        ({"resume": True, "metrics": ("pq-index",)}, "begun with --metric kurtosis"),
        ({"resume": True, "model": settings(tiny_model("opt"), out, "kurtosis").model}, "model"),
    ):
        with pytest.raises(ResumeError, match=told):
            analyze(replace(usual, **other), quiet)  # type: ignore[arg-type]
    (step,) = find_run(out).glob("*-unit-3.*")
    step.write_bytes(step.read_bytes()[:-1] + b"?")
    events: list[Event] = []
    analyze(replace(usual, resume=True), events.append)
    said = [event.message for event in events if isinstance(event, Notice)]
    assert "the step unit-3 is damaged on the disk, and 1 later ones with it: made again" in said
    analyze(replace(usual, out=tmp_path / "whole"), quiet)
    assert sha256_of(out) == sha256_of(tmp_path / "whole")


@pytest.mark.slow
def test_every_kind_of_step_is_taken_over(tiny_model: TinyModel, tmp_path: Path) -> None:
    metrics = ("cca", "taylor-integrated", "linearity", "kl")
    usual = settings(tiny_model("llama"), tmp_path / "whole", *metrics, validate=True, pairs=12)
    analyze(usual, quiet)
    moments = [("gradients", 2), ("sensitivity", 3), ("vocabulary", 1), ("truth", 4), ("plans", 3)]
    resume_after(replace(usual, out=tmp_path / "resumed"), moments)
    assert sha256_of(tmp_path / "resumed") == sha256_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A server of processes that can be killed."""
    found = Forks(PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    yield found
    found.close()


def command(model: Path, out: Path, *more: str) -> list[str]:
    text = ["--calibration", str(model.parent / "text.txt"), "--samples", "8", "--seqlen", "64"]
    return ["analyze", str(model), "-o", str(out), *text, "--batch-size", "2", *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_a_run_with_the_command_that_goes_on(
    forks: Forks, tiny_model: TinyModel, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "out.log"
    words = command(place_text_beside(tiny_model("llama")), out, "--metric", "pruning")
    assert send_at(forks, words, out, number, "unit-2") == code
    assert "Traceback" not in log.read_text()
    assert "finished steps are kept; to go on, type: cptq analyze" in log.read_text()
    assert not out.exists()
    assert forks.run([*words, "--resume"], log) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log"]


@pytest.mark.slow
def test_ten_kills_of_a_trained_model(forks: Forks, stories: Path, tmp_path: Path) -> None:
    times = random.Random(2)
    stories = shutil.copytree(stories, tmp_path / "stories260k")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--metric", "output", "--metric", "pruning", "--metric", "taylor-quantized"]
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    whole.parent.mkdir()
    out.parent.mkdir()
    assert forks.run(command(stories, whole, *words), whole.with_suffix(".log")) == 0
    draw = partial(times.uniform, 0.3, 2.5)
    kill_at_random_times(forks, command(stories, out, *words), out, 10, draw, sha256_of(whole))
