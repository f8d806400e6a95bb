"""The files in examples/ run as a user runs them, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def run(name: str, place: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_runs(tiny_model: TinyModel, place: Path) -> None:
    model = tiny_model("llama")
    compressed = run("compress_a_model", place, model)
    assert (place / "example-4bit" / "report.html").is_file()
    assert "bits a weight" in compressed

    planned = run("plan_three_targets", place, model, "plans")
    assert [line.split(":")[0] for line in planned.splitlines()[::2]] == ["3bit", "4bit", "5bit"]
    assert (place / "plans" / "4bit.json").is_file()

    compared = run("evaluate_and_compare", place, model)
    assert "perplexity" in compared
    assert "size-quality front" in compared

    assert "tensors as written" in run("load_and_generate", place)


def test_there_is_no_example_that_is_not_run() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.stem}"' in text for path in EXAMPLES.glob("*.py"))
