"""The run directory: what is taken over, what is refused, and what is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cptq.errors import ArtifactError, ResumeError, count_kept
from cptq.pipeline import run_directory
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.run_directory import RunDirectory, find_run_directory, open_run
from cptq.pipeline.step_files import list_step_files
from cptq.types import Event, Notice

IDENTITY = {"cptq": "cptq 1", "--target": "--target 3bit", "--pin": ""}
STEPS = ("sensitivity", "plan", "block-0", "block-1")


class Died(Exception):
    """What ends a run here."""


@contextmanager
def running(
    out: Path,
    events: list[Event] | None = None,
    identity: dict[str, str] = IDENTITY,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[RunDirectory, Recorder]]:
    recorder = Recorder((events if events is not None else []).append)
    with open_run(out, identity, recorder, resume=resume, overwrite=overwrite) as run:
        yield run, recorder


@contextmanager
def dying(out: Path, **more: Any) -> Iterator[tuple[RunDirectory, Recorder]]:
    """A run that dies at the end of the with-block."""
    with pytest.raises(Died), running(out, **more) as found:  # noqa: PT012
        yield found
        raise Died


def die_after(out: Path, *steps: str, **more: Any) -> None:
    """A run that dies with these steps finished; each brought a notice."""
    with dying(out, **more) as (run, recorder):
        run.identify({"the model": "abc"})
        for step in steps:

            def make(step: str = step) -> str:
                recorder(Notice(kind="info", subject=step, message="made"))
                return step.upper()

            run.keep(step, make)


def fail() -> Any:
    raise AssertionError("made again")


def test_finished_steps_are_taken_over_with_their_notices(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die_after(out, *STEPS)
    events: list[Event] = []
    with running(out, events, resume=True) as (run, recorder):
        run.identify({"the model": "abc"})
        assert run.finished == len(STEPS)
        assert [run.keep(step, fail) for step in STEPS] == [step.upper() for step in STEPS]
        assert "block-2" not in run
        assert run.keep("block-2", lambda: (1, 2)) == (1, 2)
    assert [notice.subject for notice in recorder.notices] == list(STEPS)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_run_without_a_finished_step(tmp_path: Path) -> None:
    with pytest.raises(Died) as caught, running(tmp_path / "deep" / "er" / "out"):
        raise Died
    assert list(tmp_path.iterdir()) == []
    assert count_kept(caught.value) == 0


def test_an_error_says_what_is_kept(tmp_path: Path) -> None:
    error = Died()
    with suppress(Died), running(tmp_path / "out") as (run, _):
        run.save("plan", 1)
        raise error
    assert count_kept(error) == 1
    assert "resume=True goes on" in error.__notes__[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "vanish"])
@pytest.mark.parametrize("which", [1, 3])
def test_work_goes_on_from_the_last_intact_step(tmp_path: Path, damage: str, which: int) -> None:
    out = tmp_path / "out"
    die_after(out, *STEPS)
    file = list_step_files(find_run_directory(out))[which].path
    raw = file.read_bytes()
    if damage == "vanish":
        file.unlink()
    else:
        file.write_bytes({"flip": raw[:-1] + b"?", "cut": raw[:50], "empty": b""}[damage])
    with running(out, resume=True) as (run, recorder):
        assert run.finished == which - 1
        (warning,) = recorder.notices
        assert warning.kind == "warning"
        assert "damaged" in warning.message
        assert [run.keep(step, lambda: "anew") for step in STEPS[which - 1 :]] == (
            ["anew"] * (5 - which)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_of_the_run_makes_all_steps_worthless(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die_after(out, *STEPS)
    list_step_files(find_run_directory(out))[0].path.write_bytes(b"")
    with running(out, resume=True) as (run, recorder):
        assert run.finished == 0
        assert "the step run is damaged" in recorder.notices[0].message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cptq": "cptq 2"}, "it was begun with cptq 1, this run says cptq 2"),
        ({"--target": "--target 4bit"}, "with --target 3bit, this run says --target 4bit"),
        ({"--pin": "--pin down=8bit"}, "with no --pin, this run says --pin down=8bit"),
        ({"the model": "abd"}, "was begun with another model"),
    ],
)
def test_a_run_that_differs_is_refused_by_name(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    out = tmp_path / "out"
    die_after(out, *STEPS)
    with (
        pytest.raises(ResumeError, match=words) as caught,
        running(out, identity=IDENTITY | change, resume=True),
    ):
        pass
    assert caught.value.exit_code == 2
    with running(out, resume=True) as (run, _):
        assert run.finished == len(STEPS)  # the refusal cost nothing


def test_both_ways_on_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die_after(out, *STEPS)
    with pytest.raises(ResumeError, match=r"left 4 steps.*--resume to go on.*--overwrite to start"):
        running(out).__enter__()
    with running(out, overwrite=True) as (run, _):
        assert run.finished == 0
    assert list(tmp_path.iterdir()) == []


def test_overwrite_and_resume_together_resume(tmp_path: Path) -> None:
    die_after(tmp_path / "out", *STEPS)
    with running(tmp_path / "out", resume=True, overwrite=True) as (run, _):
        assert run.finished == len(STEPS)


def test_an_empty_directory_of_a_killed_run_is_nothing(tmp_path: Path) -> None:
    place = find_run_directory(tmp_path / "out")
    place.mkdir()
    (place / "lock").touch()
    (place / "000-run.partial").touch()
    (place / ".out-x.partial").mkdir()
    with running(tmp_path / "out", resume=True) as (run, recorder):
        assert sorted(path.name for path in run.path.iterdir()) == ["lock", "owner"]
        assert any("no step" in notice.message for notice in recorder.notices)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_being_removed_is_removed(tmp_path: Path) -> None:
    die_after(tmp_path / "out", *STEPS)
    find_run_directory(tmp_path / "out").rename(tmp_path / ".out.cptq-run.old")
    with running(tmp_path / "out") as (run, _):
        assert run.finished == 0
    assert list(tmp_path.iterdir()) == []


def test_half_a_replacement_is_undone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die_after(out, "plan")
    aside = find_run_directory(out) / ".out-abc.old"
    aside.mkdir()
    (aside / "model").write_text("precious")
    with dying(out, resume=True):
        assert (out / "model").read_text() == "precious"


def test_its_own_output_is_known(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "cptq.json").write_text("{}")
    with dying(out) as (run, _):
        run.announce_output(out)
    with dying(out, resume=True) as (run, _):
        assert run.owns_output
        (out / "cptq.json").write_text("[]")
        assert not run.owns_output


def test_a_full_disk_is_told_and_costs_no_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    die_after(out, "a")
    monkeypatch.setattr(run_directory, "write_step", full)
    words = "the disk is full: the finished step b"
    with pytest.raises(ArtifactError, match=words) as caught, running(out, resume=True) as (run, _):
        run.save("b", 2)
    assert count_kept(caught.value) == 1
    monkeypatch.undo()
    with running(out, resume=True) as (run, _):
        assert run.load("a") == "A"


def hold(out: Path, ready: Any, stop: Any) -> None:
    with running(out):
        ready.set()
        stop.wait(20)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Event(), fork.Event()
    first = fork.Process(target=hold, args=(out, ready, stop))
    first.start()
    assert ready.wait(20)
    for more in ({}, {"resume": True}, {"overwrite": True}):
        words = rf"another run \(process {first.pid}\) is writing .*out; wait"
        with pytest.raises(ResumeError, match=words) as caught, running(out, **more):
            pass
        assert count_kept(caught.value) is None  # what there is belongs to the other
    os.kill(first.pid, signal.SIGKILL)  # type: ignore[arg-type]
    first.join()
    with running(out):
        pass
    assert list(tmp_path.iterdir()) == []


def compete(out: Path, rounds: int, wrong: Any, held: Any) -> None:
    for _ in range(rounds):
        try:
            with running(out) as (run, _):
                inside = run.path.parent / "inside"
                try:
                    inside.touch(exist_ok=False)
                except FileExistsError:
                    wrong.value += 1
                time.sleep(0.001)
                inside.unlink()
                held.value += 1
        except ResumeError:
            pass


def test_a_lock_file_that_vanishes_locks_nobody_out_and_lets_no_two_in(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    wrong, held = fork.Value("i", 0), fork.Value("i", 0)
    workers = [
        fork.Process(target=compete, args=(tmp_path / "out", 25, wrong, held)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert wrong.value == 0
    assert held.value > 10
    assert list(tmp_path.iterdir()) == []
