"""The files in examples/ run as a user runs them, one after the other."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TinyModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., str]
pytestmark = pytest.mark.usefixtures("same_process", "short_manual")


def run_process(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["here", pytest.param("in processes", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run an example in `tmp_path` and return what it prints. Every process takes seconds to import
    torch, so the quick tests run the files in this one."""
    monkeypatch.chdir(tmp_path)

    def run_here(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_here if request.param == "here" else run_process


@pytest.mark.filterwarnings("ignore::UserWarning:cptq")  # fallbacks, where nothing is listening
def test_every_example_runs(tiny_model: TinyModel, tmp_path: Path, run: Run) -> None:
    model = tiny_model("llama")
    compressed = run("compress_a_model", model)
    assert (tmp_path / "example-4bit" / "report.html").is_file()
    assert "bits a weight" in compressed

    planned = run("plan_three_targets", model, "plans")
    assert [line.split(":")[0] for line in planned.splitlines()[::2]] == ["3bit", "4bit", "5bit"]
    assert (tmp_path / "plans" / "4bit.json").is_file()

    compared = run("evaluate_and_compare", model)
    assert "perplexity" in compared
    assert "size-quality front" in compared

    assert "tensors as written" in run("load_and_generate")


def test_there_is_no_example_that_is_not_run() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.stem}"' in text for path in EXAMPLES.glob("*.py"))
