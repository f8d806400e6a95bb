"""Every failure: one sentence on stderr, the right exit code, a traceback only on demand."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cptq.cli.app import asks_for_json, main
from cptq.cli.failures import explain
from cptq.errors import ArtifactError, ModelError
from tests.unit.cli.conftest import FakePipeline

Cptq = Callable[..., Result]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compress", "no model is given"),
        ("compress m --metric outptu", "unknown metric 'outptu'.*did you mean 'output'"),
        ("analyze m --metric tailor", "unknown metric 'tailor'.*did you mean 'taylor'"),
        ("analyze m --metric al", "did you mean 'all'"),
        ("compress m --allocator knapsak", "unknown allocator.*did you mean 'knapsack'"),
        ("compress m --compressor gtpq", "unknown compressor.*did you mean 'gptq'"),
        ("compress m --target banana", "'banana'.*allowed: 4bit"),
        ("compress m --bits 4,9", "--bits holds 9"),
        ("compress m --bits four", "--bits is 'four'"),
        ("compress m --samples 0", "--samples is 0"),
        ("compress m --dtype int8", "--dtype is 'int8'.*allowed"),
        ("compress m --calibration wikitxt", "did you mean 'wikitext'"),
        ("compress m --config absent.yaml", "absent.yaml cannot be read: No such file"),
        ("compress m --plan absent.json", "absent.json cannot be read: no such file"),
        ("compress m --plan absent.json --target 4bit", "--target would be ignored"),
        ("eval m --task wikitxt", "unknown task 'wikitxt'.*did you mean 'wikitext'"),
        ("eval m --limit 0", "--limit is 0"),
        ("eval m -o .", "already there"),
        ("compress m -o there", "there is already there; give another -o, or --overwrite"),
        ("compress m -o there --overwrite", "there was not written by cptq"),
        ("compress there -o there --overwrite", "would replace the model itself"),
        ("compress there/model -o there --overwrite", "would replace the model itself"),
        ("compress m -o there/file.txt/x", "cannot be written"),
    ],
)
def test_refused_before_the_pipeline(
    cptq: Cptq, pipeline: FakePipeline, line: str, message: str
) -> None:
    Path("there/model").mkdir(parents=True)
    Path("there/file.txt").write_text("mine")
    result = cptq(*line.split())
    assert result.exit_code in (1, 2)
    assert pipeline.seen == []
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert Path("there/file.txt").read_text() == "mine"


def test_overwrite_takes_what_cptq_wrote_and_what_is_empty(cptq: Cptq) -> None:
    Path("ours").mkdir()
    assert cptq("compress", "m", "-o", "ours", "--overwrite").exit_code == 0
    Path("ours/cptq.json").write_text("{}")
    assert cptq("compress", "m", "-o", "ours").exit_code == 2
    assert cptq("compress", "m", "-o", "ours", "--overwrite").exit_code == 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"choices": {}}', '"text"', "null"])
def test_a_file_that_is_no_plan(cptq: Cptq, pipeline: FakePipeline, text: str) -> None:
    Path("plan.json").write_text(text)
    result = cptq("compress", "m", "--plan", "plan.json")
    assert result.exit_code == 1
    assert "plan.json holds no plan" in result.stderr
    assert pipeline.seen == []


FULL = OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelError("no such model", hint="look at it"), 1, "no such model; look at it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "the memory is not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "the memory is not enough"),
        (FULL, 1, "no space is left on the disk for out/model.safetensors"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "no space is left"),
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
    assert explain(error).problem == "cannot write"
    other = RuntimeError("cannot write")
    other.__cause__ = FULL
    assert "no space" in explain(other).sentence


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


@pytest.mark.parametrize("shape", [[], ["--format", "json"], ["--format=json"]])
def test_a_line_that_cannot_be_read(
    shape: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cptq.cli.app.prepare", lambda environ: None)
    monkeypatch.setattr("cptq.cli.app.hush", lambda: None)
    with pytest.raises(SystemExit) as raised:
        main(["compress", "m", "--taget", "4bit", *shape])
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("Error: No such option: --taget")
    assert "--target" in err
    assert err.count("\n") == 1
    assert (json.loads(out)["error"]["exit_code"] == 2) if shape else out == ""


def test_asks_for_json() -> None:
    assert asks_for_json(["eval", "--format", "json"])
    assert asks_for_json(["--format=json"])
    assert not asks_for_json(["--format", "quiet", "json"])
    assert not asks_for_json(["--format"])
