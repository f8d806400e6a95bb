"""Signals: exceptions once, exit codes, and handlers that are put back."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cptq.cli import signals as module
from cptq.cli.continuation import spell_continuation
from cptq.cli.signals import catch_signals
from cptq.config import AnalyzeSettings, CompressSettings, EvalSettings, settings_from
from cptq.errors import ArtifactError, mark_kept
from cptq.types import Event, Progress
from tests.unit.cli.conftest import Cptq, FakePipeline

EVENT = Progress(stage="x", done=0, total=1)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Let signals do what they do by default, whatever whoever started the tests ignores."""
    before = {number: signal.getsignal(number) for number in CODES}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_becomes_an_interrupt_with_its_exit_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with catch_signals() as found:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the first one is still carried out
        assert found.exit_code == CODES[number]
    assert signal.getsignal(number) is before


def test_a_later_signal_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with catch_signals():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as found:
            os.kill(os.getpid(), signal.SIGHUP)
            assert found.received is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_touch_no_handler() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def look() -> None:
        with catch_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupt_that_was_swallowed_comes_back_with_the_next_event() -> None:
    events: list[Event] = []
    with catch_signals() as found:
        emit = found.pass_on(events.append)
        emit(EVENT)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            emit(EVENT)  # on the way out: partial results are being kept, say
        with pytest.raises(KeyboardInterrupt):
            emit(EVENT)
    assert len(events) == 2


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("cptq compress m -o 'a b'", "cptq compress m -o 'a b' --resume"),
        ("/bin/cptq compress --resume m", "cptq compress --resume m"),
        ("cptq compress -- -m", "cptq compress --resume -- -m"),
        ("cptq compress m --token hf_x", "cptq compress m --resume"),
        ("cptq compress --token=hf_x m", "cptq compress m --resume"),
        ("x/cptq/__main__.py compress m", f"{sys.executable} -m cptq compress m --resume"),
        ("pytest x", "cptq compress m --target 3bit --out 'a b' --resume"),
    ],
)
def test_the_command_that_goes_on(line: str, command: str) -> None:
    settings = settings_from(CompressSettings, {"model": "m", "target": "3bit", "out": "a b"})
    assert spell_continuation(settings, shlex.split(line)) == command


def test_an_analysis_goes_on_too_and_other_commands_do_not() -> None:
    settings = settings_from(AnalyzeSettings, {"model": "m"})
    assert spell_continuation(settings, ["cptq", "analyze", "m"]) == "cptq analyze m --resume"
    assert spell_continuation(settings, ["pytest"]) == "cptq analyze m --resume"
    assert spell_continuation(settings_from(EvalSettings, {"model": "m"})) is None


@pytest.mark.parametrize(
    ("kept", "error", "code", "end"),
    [
        (3, KeyboardInterrupt(), 130, "interrupted; 3 finished steps are kept; to go on, type: "),
        (1, ArtifactError("bad", hint="do"), 1, "bad; do; 1 finished step is kept; to go on, type"),
        (0, KeyboardInterrupt(), 130, "interrupted; no step was finished yet, so nothing is kept"),
        (0, ArtifactError("bad"), 1, "Error: bad"),
        (None, KeyboardInterrupt(), 130, "Error: interrupted"),
    ],
)
def test_a_failure_says_what_is_kept(
    cptq: Cptq,
    pipeline: FakePipeline,
    kept: int | None,
    error: BaseException,
    code: int,
    end: str,
) -> None:
    if kept is not None:
        mark_kept(error, kept, "somewhere")
    pipeline.error = error
    result = cptq("compress", "m", "-o", "out")
    assert result.exit_code == code
    last = result.stderr.splitlines()[-1]
    assert end in last
    assert last.endswith("cptq compress m --out out --resume" if kept else end)
    assert not Path("out").exists()


def test_a_program_gets_the_command_too(cptq: Cptq, pipeline: FakePipeline) -> None:
    pipeline.error = KeyboardInterrupt()
    mark_kept(pipeline.error, 2, "somewhere")
    out = cptq("compress", "m", "--format", "json").stdout
    assert '"resume": "cptq compress m --out m-cptq-4bit --resume"' in out
