"""`cptq bench` on the command line: its options, its formats, what it refuses at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cptq.cli.app import app
from cptq.config import BenchSettings, command_line
from cptq.errors import EvaluationError
from cptq.report.bench import BenchOutcome
from cptq.types import Emit
from tests.unit.cli.conftest import FakePipeline
from tests.unit.report.test_bench import make_bench, make_model


@pytest.fixture
def seen(pipeline: FakePipeline) -> list[BenchSettings]:
    """The settings that reach the pipeline."""
    asked: list[BenchSettings] = []

    def bench(settings: BenchSettings, emit: Emit) -> BenchOutcome:
        asked.append(settings)
        if pipeline.error is not None:
            raise pipeline.error
        found = make_bench(make_model("one", 1.0), make_model("two", 0.5))
        return BenchOutcome(bench=found, out=settings.out)

    sys.modules["cptq.pipeline"].bench = bench  # type: ignore[attr-defined]
    return asked


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["bench", *words])


def test_all_options_reach_the_pipeline(seen: list[BenchSettings]) -> None:
    line = (
        "a b c --dtype bfloat16 --prompt-tokens 9 --new-tokens 4 --repeats 2 --batch-size 2,16"
        " --threads 3 --seed 5 --out b.json"
    )
    result = run(*line.split())
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert settings.sources == ("a", "b", "c")
    assert (settings.batch_size, settings.threads, settings.seed) == ((2, 16), 3, 5)
    assert command_line(settings) == f"cptq bench {line}"


def test_the_output_in_every_format(seen: list[BenchSettings]) -> None:
    human = run("a", "b").stdout
    assert max(map(len, human.splitlines())) <= 80
    assert "Speed: tokens per second, median of 3 repetitions" in human
    assert run("a", "b", "--format", "quiet").stdout.splitlines() == ["1000.0", "500.0"]
    data = json.loads(run("a", "b", "--format", "json", "-o", "b.json").stdout)
    assert (data["command"], data["out"]) == ("bench", "b.json")
    assert [model["name"] for model in data["models"]] == ["one", "two"]


def test_a_dead_process_is_one_sentence(seen: list[BenchSettings], pipeline: FakePipeline) -> None:
    pipeline.error = EvaluationError("the process that runs a ended: it ran out of memory")
    result = run("a")
    assert result.exit_code == 1
    assert result.stderr == "Error: the process that runs a ended: it ran out of memory\n"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ((), 2, "no model is given"),
        (("m", "--new-tokens", "1"), 2, "--new-tokens is 1"),
        (("m", "--batch-size", "1,0"), 2, "--batch-size holds 0"),
        (("m", "--batch-size", "one"), 2, "'one'"),
        (("m", "--threads", "0"), 2, "--threads is 0"),
        (("m", "--dtype", "int8"), 2, "--dtype is 'int8'"),
        (("m", "-o", "there.json"), 2, "add --overwrite"),
        (("m", "--overwrite", "-o", "folder"), 2, "folder is a directory"),
        (("m", "absent.gguf"), 1, "absent.gguf"),
        (("m", "here.gguf"), 1, 'pip install "cptq[llamacpp]"'),
    ],
)
def test_what_is_refused_at_once(
    seen: list[BenchSettings],
    words: tuple[str, ...],
    code: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cptq.preflight.find_spec", lambda name: None)
    for name in ("there.json", "here.gguf"):
        Path(name).write_text("")
    Path("folder").mkdir()
    result = run(*words)
    assert result.exit_code == code, result.output
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert seen == []
