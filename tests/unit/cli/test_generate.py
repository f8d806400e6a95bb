"""`cptq generate` on the command line: the text alone on stdout, the numbers on stderr."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner, Result

from cptq.cli.app import app
from cptq.config import GenerateSettings, command_line
from cptq.report.generation import GenerateOutcome
from cptq.types import Emit, Fragment, Notice, Progress
from tests.unit.cli.conftest import FakePipeline

OUTCOME = GenerateOutcome(
    text="one two", prompt_tokens=3, new_tokens=2, first_seconds=0.5, later_seconds=0.25,
    ending="new tokens", way="generate",
)  # fmt: skip
STATISTICS = (
    "prompt: 3 tokens, 6/s; new: 2 tokens, 4/s; first after 0.5 s; ended by: new tokens; "
    "decoded by: generate"
)


@pytest.fixture
def seen(pipeline: FakePipeline) -> list[GenerateSettings]:
    """The settings that a pipeline gets which writes `one two`."""
    asked: list[GenerateSettings] = []

    def generate(settings: GenerateSettings, emit: Emit) -> GenerateOutcome:
        asked.append(settings)
        emit(Progress(stage="load", done=0, total=None))
        emit(Notice(kind="warning", subject="s", message="m"))
        for piece in ("one", " two"):
            emit(Fragment(text=piece))
        return OUTCOME

    sys.modules["cptq.pipeline"].generate = generate  # type: ignore[attr-defined]
    return asked


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["generate", *words])


def test_stdout_holds_the_text_alone(seen: list[GenerateSettings]) -> None:
    result = run("m", "--prompt", " a b ", "--max-new-tokens", "9")
    assert result.exit_code == 0, result.output
    assert result.stdout == "one two\n"
    assert result.stderr.splitlines()[-1] == STATISTICS
    assert (seen[0].prompt, seen[0].max_new_tokens) == (" a b ", 9)


def test_quiet_is_the_text_and_nothing_else(seen: list[GenerateSettings]) -> None:
    result = run("m", "--prompt", "a", "--format", "quiet")
    assert result.stdout == "one two\n"
    assert "tokens" not in result.stderr


def test_json_is_one_document(seen: list[GenerateSettings]) -> None:
    data = json.loads(run("m", "--prompt", "a", "--format", "json").stdout)
    assert (data["command"], data["text"], data["way"]) == ("generate", "one two", "generate")
    assert (data["prompt_tokens_per_second"], data["tokens_per_second"]) == (6.0, 4.0)


def test_the_line_repeats_the_run(seen: list[GenerateSettings]) -> None:
    words = ("m", "--prompt", "it's", "--chat", "--temperature", "0.5", "--top-p", "0.9")
    assert run(*words).exit_code == 0
    line = command_line(seen[0])
    assert line == ("cptq generate m --prompt 'it'\"'\"'s' --chat --temperature 0.5 --top-p 0.9")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "no model is given"),
        (("m.gguf", "--prompt", "a"), "m.gguf is a GGUF file"),
        (("m",), "no --prompt is given"),
        (("m", "--prompt", ""), "no --prompt is given"),
        (("m", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("m", "--prompt", "a", "--temperature", "-1"), "--temperature is -1"),
        (("m", "--prompt", "a", "--top-p", "0.5"), "add --temperature 1"),
        (("m", "--prompt", "a", "--temperature", "1", "--top-p", "0"), "--top-p is 0"),
    ],
)
def test_bad_lines(seen: list[GenerateSettings], words: tuple[str, ...], named: str) -> None:
    result = run(*words)
    assert result.exit_code == (1 if "m.gguf" in words else 2)
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert seen == []
