"""Processes to measure in: answers, and a sentence about every way to end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cptq.errors import EvaluationError
from cptq.evaluation.fresh_process import (
    Worker,
    build_environment,
    explain_end,
    read_resident_bytes,
)

SCRIPT = "tests.unit.evaluation.scripted_process"


def test_a_worker_answers_until_it_is_closed() -> None:
    with Worker("m", SCRIPT, {"a": 1}) as worker:
        assert worker.ask(b=2) == {"job": {"a": 1}, "b": 2}
        assert worker.ask(c=[3]) == {"job": {"a": 1}, "c": [3]}
        process = worker.process
    assert process.returncode is not None


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"signal": "SIGKILL"}, ("SIGKILL", "memory", "--batch-size")),
        ({"signal": "SIGSEGV"}, ("SIGSEGV",)),
        ({"message": "MemoryError"}, ("ran out of memory", "--batch-size")),
        ({"message": "Traceback\n  in x\nValueError: no such thing"}, ("ValueError: no such",)),
    ],
)
def test_a_worker_that_dies_is_one_sentence(
    request_: dict[str, Any], named: tuple[str, ...]
) -> None:
    with Worker("my model", SCRIPT, {}) as worker:
        for _ in range(2):  # also if it is asked again
            with pytest.raises(EvaluationError) as caught:
                worker.ask(**request_)
            assert "my model" in caught.value.problem
            for word in named:
                assert word in str(caught.value)
            assert "\n" not in str(caught.value)


def test_why_a_process_ended() -> None:
    assert explain_end(1, "a\n\n ValueError: no \n\n") == "ValueError: no"
    assert explain_end(3, "") == "exit status 3"
    assert "SIGKILL" in explain_end(-9, "some progress")
    assert explain_end(-15, "") == "it was ended by SIGTERM"
    for text in ("MemoryError", "RuntimeError: can't allocate memory", "CUDA out of memory."):
        assert explain_end(1, text) == "it ran out of memory"
    assert len(explain_end(1, "x" * 5000)) <= 300


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = build_environment(3)
    first, rest = found["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "cptq" / "__init__.py").exists()
    assert rest == "/elsewhere"
    assert (found["OMP_NUM_THREADS"], found["HF_HUB_OFFLINE"]) == ("3", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert build_environment()["OMP_NUM_THREADS"] == "7"


def test_resident_memory_grows_with_what_is_held() -> None:
    before = read_resident_bytes("VmRSS")
    held = bytearray(os.urandom(1 << 25))
    assert read_resident_bytes("VmRSS") - before > len(held) / 2
    assert read_resident_bytes("VmHWM") >= read_resident_bytes("VmRSS") - 2**20
