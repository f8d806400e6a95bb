"""`cptq compress` that is killed, interrupted or disturbed, and goes on to the very same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyModel
from tests.integration.forks import KEEP, TEXT, Forks, place_text_beside

SMALL = [*("--samples", "4", "--seqlen", "64", "--batch-size", "2", "--target", "3.5bit")]
SMALL += ["--group-size", "16"]
#: what --check-uniform and --tune leave, in their order, beside a step per unit that is measured
BLOCKS = ["block-0", "block-1", "head"]
STEPS = ["run", "sensitivity", "plan", "trial-256", "chosen-plan", *BLOCKS, "quality", "written"]
MOMENTS = ["sensitivity", "trial-256", "block-0"]
TUNED = ["run", "sensitivity", "plan", "chosen-plan", *BLOCKS, "tuned", "quality", "written"]
#: seconds after which a test gives up
PATIENCE = 120.0


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A server of processes that can be killed."""
    found = Forks(PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    yield found
    found.close()


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return place_text_beside(tiny_model("llama"))


def sha256_of(artifact: Path) -> dict[str, str]:
    """The digests of all files but the reports, which hold times."""
    return {
        path.relative_to(artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifact.rglob("*"))
        if path.is_file() and not path.name.startswith("report.")
    }


@pytest.fixture(scope="module")
def whole(forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted run."""
    return compress_whole(forks, model, tmp_path_factory.mktemp("whole"))


def compress_whole(forks: Forks, model: Path, place: Path, *more: str) -> dict[str, str]:
    place.mkdir(exist_ok=True)
    words = command(model, place / "out", *more)
    assert forks.run(words, place.with_suffix(".log")) == 0, place.with_suffix(".log").read_text()
    assert [path.name for path in place.iterdir()] == ["out"]
    return sha256_of(place / "out")


def command(model: Path, out: Path, *more: str) -> list[str]:
    """A command line; without the comparison of plans, unless it is asked for."""
    text = ["--calibration", str(model.parent / "text.txt")]
    plain = [] if "--check-uniform" in more else ["--no-check-uniform"]
    return ["compress", str(model), "-o", str(out), *text, *SMALL, *plain, *more]


def find_run(out: Path) -> Path:
    return out.with_name(f".{out.name}.cptq-run")


def list_steps(out: Path) -> list[str]:
    names = sorted(path.name for path in find_run(out).glob("*.safetensors"))
    return [name.split(".")[0].partition("-")[2] for name in names]


def wait_for(what: Callable[[], Any]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def ended(pid: int) -> bool:
    """Whether a process that nobody has waited for is dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def send_at(forks: Forks, words: list[str], out: Path, number: signal.Signals, step: str) -> int:
    """Run a command and send it a signal when a step is finished; return its exit code."""
    pid = forks.start(words, out.with_suffix(".log"))
    wait_for(lambda: step in list_steps(out) or ended(pid))
    os.kill(pid, number)
    return forks.wait(pid)


@pytest.mark.slow
def test_a_run_that_is_killed_after_every_step_writes_the_same_bytes(
    forks: Forks, model: Path, tmp_path: Path
) -> None:
    wanted = compress_whole(forks, model, tmp_path / "plain", "--check-uniform")
    kill_after_steps(forks, model, tmp_path / "out", STEPS, MOMENTS, "--check-uniform")
    assert sha256_of(tmp_path / "out") == wanted


@pytest.mark.slow
def test_a_run_that_tunes_and_is_killed_writes_the_same_bytes(
    forks: Forks, model: Path, tmp_path: Path
) -> None:
    wanted = compress_whole(forks, model, tmp_path / "plain", "--tune")
    kill_after_steps(
        forks, model, tmp_path / "out", TUNED, ["block-1", "tuned", "quality"], "--tune"
    )
    assert sha256_of(tmp_path / "out") == wanted


def kill_after_steps(
    forks: Forks, model: Path, out: Path, steps: list[str], moments: list[str], *more: str
) -> None:
    """Kill a run after some steps, resuming it each time, and let it end."""
    resume: list[str] = []
    for step in moments:
        words = command(model, out, *more, *resume)
        assert send_at(forks, words, out, signal.SIGKILL, step) == -signal.SIGKILL
        left = list_steps(out)
        of_the_run = [name for name in left if name in steps]
        assert of_the_run == steps[: len(of_the_run)]
        assert step in of_the_run
        assert not out.exists()
        resume = ["--resume"]
    assert forks.run(command(model, out, *more, "--resume"), out.with_suffix(".log")) == 0
    assert not find_run(out).exists()


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_time_writes_the_same_bytes(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    times = random.Random(0)
    draw = partial(times.uniform, 0.05, 1)
    kill_at_random_times(forks, command(model, tmp_path / "out"), tmp_path / "out", 3, draw, whole)


def kill_at_random_times(
    forks: Forks,
    words: list[str],
    out: Path,
    kills: int,
    draw: Callable[[], float],
    wanted: dict[str, str],
) -> None:
    """Kill a run so often, resuming it each time; what ends before that begins anew."""
    log = out.with_suffix(".log")
    while kills:
        more = ["--resume"] if list_steps(out) else []
        pid = forks.start([*words, *more], log)
        time.sleep(draw())
        os.kill(pid, signal.SIGKILL)
        code = forks.wait(pid)
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:
            assert sha256_of(out) == wanted
            shutil.rmtree(out)
        kills -= code != 0
    more = ["--resume"] if list_steps(out) else []
    assert forks.run([*words, *more], log) == 0, log.read_text()
    assert sha256_of(out) == wanted
    assert not find_run(out).exists()


@pytest.mark.slow
def test_a_run_that_is_killed_when_its_output_is_in_place_replaces_its_own(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    send_at(forks, command(model, out), out, signal.SIGKILL, "head")
    # the run directory as it is when the output is in place, put back after the end: what a kill
    # before its removal leaves
    kept, log = tmp_path / "kept", tmp_path / "log"
    pid = forks.start(command(model, out, "--resume"), log, **{KEEP: str(kept)})
    assert forks.wait(pid) == 0
    (written,) = kept.glob("*-written.*")
    content = written.read_bytes()
    written.unlink()  # without it the output might be anyone's
    kept.rename(find_run(out))
    assert forks.run(command(model, out, "--resume"), log) == 2
    assert "--overwrite to replace it" in log.read_text()
    (find_run(out) / written.name).write_bytes(content)
    assert forks.run(command(model, out, "--resume"), tmp_path / "log") == 0
    assert sha256_of(out) == whole
    assert not find_run(out).exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_a_run_with_the_command_that_goes_on(
    forks: Forks,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    out, log = tmp_path / "an 'output", tmp_path / "an 'output.log"
    words = command(model, out)
    assert send_at(forks, words, out, number, "block-0") == code
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [find_run(out).name, log.name]
    )
    assert not list(find_run(out).glob(".*"))  # no draft, no check
    message = log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()
    assert "finished steps are kept; to go on, type: cptq compress" in message
    line = shlex.split(message.partition("type: ")[2])
    assert line == ["cptq", *words, "--resume"]
    if number != signal.SIGTERM:
        return  # the command is the same
    assert forks.run(line[1:], log) == 0
    assert sha256_of(out) == whole


def test_an_impatient_hand_and_a_run_that_has_done_nothing(
    forks: Forks, model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "deep" / "out", tmp_path / "log"
    pid = forks.start(command(model, out), log)
    wait_for((find_run(out) / "owner").exists)
    for _ in range(5):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.02)
    assert forks.wait(pid) == 130
    assert "interrupted; no step was finished yet, so nothing is kept" in log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_a_damaged_step_is_made_again(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path, tiny_model: TinyModel
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    send_at(forks, command(model, out), out, signal.SIGKILL, "block-1")
    for words, told in (
        (command(model, out), "add --resume to go on from them, or --overwrite to start anew"),
        (
            command(model, out, "--target", "4bit", "--resume"),
            "it was begun with --target 3.5bit, this run says --target 4bit",
        ),
        (command(tiny_model("llama", seed=3), out, "--resume"), "begun with another model"),
    ):
        assert forks.run(words, log) == 2
        assert told in log.read_text()
    (block,) = find_run(out).glob("*-block-0.*")
    block.write_bytes(block.read_bytes()[:-1] + b"?")
    assert forks.run(command(model, out, "--resume"), log) == 0
    assert "the step block-0 is damaged on the disk" in log.read_text()
    assert sha256_of(out) == whole


def test_two_runs_do_not_write_one_output(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "second"
    pid = forks.start(command(model, out), tmp_path / "first")
    wait_for((find_run(out) / "owner").exists)
    os.kill(pid, signal.SIGSTOP)
    for more in ((), ("--resume",), ("--overwrite",)):
        assert forks.run(command(model, out, *more), log) == 2
        assert f"another run (process {pid}) is writing {out}" in log.read_text()
    os.kill(pid, signal.SIGCONT)
    assert forks.wait(pid) == 0
    assert sha256_of(out) == whole


@pytest.mark.slow
def test_a_full_disk_ends_with_the_command_that_goes_on(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """As no small disk is at hand the run may write no large file: RLIMIT_FSIZE."""
    out, log = tmp_path / "out", tmp_path / "log"
    send_at(forks, command(model, out), out, signal.SIGKILL, "block-0")
    largest = max(path.stat().st_size for path in find_run(out).glob("*-block-0.*"))
    pid = forks.start(command(model, out, "--resume"), log)
    subprocess.run(["prlimit", f"--fsize={largest - 100}", f"--pid={pid}"], check=True)
    assert forks.wait(pid) == 1
    assert "cannot be written: File too large" in log.read_text()
    assert "to go on, type: cptq compress" in log.read_text()
    assert "block-0" in list_steps(out)
    assert not list(find_run(out).glob("*.partial"))
    assert forks.run(command(model, out, "--resume"), log) == 0
    assert sha256_of(out) == whole


@pytest.mark.slow
def test_neither_hash_seeds_nor_threads_nor_paths_change_a_byte(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    other = Forks(PYTHONHASHSEED="2", OMP_NUM_THREADS="2")
    elsewhere = shutil.copytree(model.parent, tmp_path / "deep") / model.name
    assert compress_whole(other, elsewhere, tmp_path / "other") == whole
    other.close()
    assert {"cptq.json", "model.safetensors", "plan.json", "sensitivity/output.json"} <= set(whole)


@pytest.mark.slow
def test_a_signal_ends_the_process_of_the_reload_check(model: Path, tmp_path: Path) -> None:
    """In a process of its own, with the real check."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "cptq", *command(model, out)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: list(find_run(out).glob("*check*/job.json")) and children.read_text())
    (child,) = children.read_text().split()
    began = time.monotonic()
    process.terminate()
    _, told = process.communicate()
    assert time.monotonic() - began < 5
    assert process.returncode == 143
    assert not Path(f"/proc/{child}/exe").exists()  # a zombie where nobody reaps orphans
    assert not list(find_run(out).glob(".*"))
    assert not list(find_run(out).glob("*check*"))
    last = shlex.split(told.splitlines()[-1].partition("type: ")[2])
    assert last == [*line, "--resume"]
    subprocess.run(last, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_twenty_kills_of_a_trained_model(forks: Forks, stories: Path, tmp_path: Path) -> None:
    times = random.Random(1)
    stories = shutil.copytree(stories, tmp_path / "stories260k")
    (tmp_path / "text.txt").write_text(TEXT)
    more = ("--tune", "--check-uniform", "--tune-minutes", "60")
    wanted = compress_whole(forks, stories, tmp_path / "plain", *more)
    out = tmp_path / "out"
    draw = partial(times.uniform, 0.2, 2.5)
    kill_at_random_times(forks, command(stories, out, *more), out, 20, draw, wanted)
