"""Every failure: one sentence on stderr, the right exit code, a traceback only on request."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path

import pytest
import typer

from cptq.cli.app import requests_json
from cptq.cli.console import Console
from cptq.cli.failures import describe_failure, report_failures
from cptq.cli.signals import Signals
from cptq.errors import ArtifactError, ModelError, ProcessError
from tests.unit.cli.conftest import Cptq, FakePipeline


def test_overwrite_takes_what_cptq_wrote_and_what_is_empty(cptq: Cptq) -> None:
    Path("ours").mkdir()
    assert cptq("compress", "m", "-o", "ours", "--overwrite").exit_code == 0
    Path("ours/cptq.json").write_text("{}")
    assert cptq("compress", "m", "-o", "ours").exit_code == 2
    assert cptq("compress", "m", "-o", "ours", "--overwrite").exit_code == 0


FULL = OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelError("no such model", hint="look at it"), 1, "no such model; look at it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory"),
        (FULL, 1, "no space left on the disk for out/model.safetensors"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x: permission denied"),
        (ValueError("odd\nthing"), 70, "internal error: ValueError: odd thing; this is a defect"),
        (AssertionError(), 70, "internal error: AssertionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_the_pipeline_raises(
    cptq: Cptq, pipeline: FakePipeline, error: BaseException, code: int, message: str
) -> None:
    pipeline.error = error
    result = cptq("compress", "m")
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_full_disk_behind_another_error_is_still_a_full_disk() -> None:
    error = ArtifactError("cannot write")
    error.__cause__ = FULL
    assert describe_failure(error).problem == "cannot write"
    other = RuntimeError("cannot write")
    other.__cause__ = FULL
    assert "no space" in describe_failure(other).problem


def test_debug_shows_the_traceback(
    cptq: Cptq, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.error = ValueError("odd")
    monkeypatch.setenv("CPTQ_DEBUG", "1")
    result = cptq("compress", "m")
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert "test_failures" not in result.stdout


def test_json_tells_errors_on_stdout_too(cptq: Cptq, pipeline: FakePipeline) -> None:
    pipeline.error = ModelError("no such model", allowed="a Hub id")
    result = cptq("compress", "m", "--format", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == {
        "kind": "ModelError",
        "problem": "no such model",
        "allowed": "a Hub id",
        "hint": None,
        "exit_code": 1,
        "message": "no such model; allowed: a Hub id",
    }


def test_json_output_is_recognized_in_a_line_that_cannot_be_read() -> None:
    assert requests_json(["eval", "--format", "json"])
    assert requests_json(["--format=json"])
    assert requests_json(["export", "a", "--print", "json"])
    assert not requests_json(["export", "a", "--format", "json"])
    assert not requests_json(["--format", "quiet", "json"])
    assert not requests_json(["--format"])


def test_a_signal_after_a_death_tells_the_death() -> None:
    """A launcher sends one to the others; it may come while the death is being told."""
    signals, console = Signals(), Console()
    signals.received = signal.SIGTERM
    death = ProcessError("rank 1 of 2 processes died")
    assert describe_failure(death, signals).problem == death.problem
    assert describe_failure(KeyboardInterrupt(), signals).problem == "interrupted by SIGTERM"
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = death
    with pytest.raises(typer.Exit) as ended, report_failures(console, signals):
        raise interrupt
    assert ended.value.exit_code == 1
    signals.receive(signal.SIGTERM, None)  # raises nothing any more


def test_one_process_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, speaker, said in ((0, 0, True), (1, 0, False), (1, 1, True), (2, 1, False)):
        with pytest.raises(typer.Exit), report_failures(Console("human", rank)):
            raise ProcessError("rank 3 died", speaker=speaker)
        assert ("rank 3 died" in capsys.readouterr().err) == said
