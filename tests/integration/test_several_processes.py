"""`cptq compress` in several processes: the bytes of one, and an orderly end when one dies.

No launcher watches them here, so that they find out by themselves, and the first one holds the
store where they meet.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import TinyModel
from tests.integration.forks import Forks, place_text_beside
from tests.integration.test_resume_way import command, find_run, list_steps, sha256_of, wait_for

#: batches of one row: of the calibrating ones five, so that shares differ
ROWS = ["--samples", "5", "--batch-size", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    found = Forks(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    yield found
    found.close()


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return place_text_beside(tiny_model("llama"))


@pytest.fixture(scope="module")
def whole(forks: Forks, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert forks.run(command(model, out, *ROWS), out.with_suffix(".log")) == 0
    return sha256_of(out)


def start(
    forks: Forks, count: int, words: list[str], log: Path, last: Sequence[str] = ()
) -> list[int]:
    """Start processes that share a command, each with a log; return their ids.

    `last`: more words for the last one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        forks.start(
            [*words, *(last if rank == count - 1 else ())],
            log.with_suffix(f".{rank}"),
            **place | {"WORLD_SIZE": str(count), "RANK": str(rank)},
        )
        for rank in range(count)
    ]


def read(log: Path, rank: int) -> str:
    return log.with_suffix(f".{rank}").read_text()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_write_the_bytes_of_one(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path, count: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    pids = start(forks, count, command(model, out, *ROWS), log)
    assert [forks.wait(pid) for pid in pids] == [0] * count, read(log, 0)
    assert sha256_of(out) == whole
    assert [read(log, rank) for rank in range(1, count)] == [""] * (count - 1)
    assert "Done" in read(log, 0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == "") == ["out"]


@pytest.mark.parametrize(("killed", "after"), [pytest.param(0, 2, marks=pytest.mark.slow), (1, 1)])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(
    forks: Forks, model: Path, whole: dict[str, str], tmp_path: Path, killed: int, after: int
) -> None:
    """Rank 0, which holds the store and the run directory, or another; resumed by one or by two."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = command(model, out, *ROWS)
    pids = start(forks, 2, words, log)
    wait_for(lambda: "block-0" in list_steps(out))
    os.kill(pids[killed], signal.SIGKILL)
    began = time.monotonic()
    codes = [forks.wait(pid) for pid in pids]
    assert time.monotonic() - began < 20
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    told = read(log, 1 - killed).splitlines()[-1]
    assert told.startswith(f"Error: rank {killed} of 2 processes died")
    assert "finished steps are kept; to go on, type: cptq compress" in told
    assert "Traceback" not in read(log, 0) + read(log, 1)
    assert "block-0" in list_steps(out)
    if after == 1:
        assert forks.run([*words, "--resume"], log) == 0, log.read_text()
    else:
        pids = start(forks, after, [*words, "--resume"], log)
        assert [forks.wait(pid) for pid in pids] == [0] * after, read(log, 0)
    assert sha256_of(out) == whole
    assert not find_run(out).exists()


@pytest.mark.slow
def test_a_signal_ends_all_of_them_with_one_message(
    forks: Forks, model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    pids = start(forks, 2, command(model, out, *ROWS), log)
    wait_for(lambda: "block-0" in list_steps(out))
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    codes = [forks.wait(pid) for pid in pids]
    assert codes[0] == 143, read(log, 0)
    assert codes[1] in (130, 143)
    assert "finished steps are kept; to go on, type: cptq compress" in read(log, 0)
    assert read(log, 1) == ""


def test_the_error_of_one_is_told_by_the_first(forks: Forks, model: Path, tmp_path: Path) -> None:
    """Here it was started with another option."""
    out, log = tmp_path / "out", tmp_path / "log"
    pids = start(forks, 2, command(model, out, *ROWS), log, ["--seqlen", "32"])
    assert [forks.wait(pid) for pid in pids] == [1, 2]
    told = read(log, 0).splitlines()[-1]
    assert "Error: rank 1 of 2 processes failed: --seqlen differs: --seqlen 64 in rank 0" in told
    assert "finished steps are kept" in told
    assert read(log, 1) == ""


@pytest.mark.parametrize(
    ("words", "count", "told"),
    [
        (["compress", "m"], 3, "3 processes cannot share a run; allowed: 1, 2, 4, 8 processes"),
        (["eval", "m"], 2, "allowed: cptq compress; start it without the launcher"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_once(
    forks: Forks, tmp_path: Path, words: list[str], count: int, told: str
) -> None:
    log = tmp_path / "log"
    pids = start(forks, count, words, log)
    assert [forks.wait(pid) for pid in pids] == [2] * count
    assert told in read(log, 0)
    assert read(log, 1) == ""
