"""A pipeline that only records: what the command line is tested against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cptq.preflight  # found below a pipeline that is replaced
from cptq.cli.app import app
from cptq.report import AnalyzeOutcome, CompressOutcome, EvalOutcome
from cptq.report.comparison import CompareOutcome
from cptq.types import Emit, Notice, Progress
from tests.unit.report import synthetic

Cptq = Callable[..., Result]
OUTCOMES = {"analyze": AnalyzeOutcome, "compress": CompressOutcome, "eval": EvalOutcome}
COMMANDS = {"analyze": "analyze", "compress": "compress", "evaluate": "eval", "compare": "compare"}


@dataclass
class FakePipeline:
    """Records the settings it was given; raises `error`, if there is one."""

    seen: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def run(self, command: str, settings: Any, emit: Emit) -> Any:
        self.seen.append(settings)
        for done in range(3):
            emit(Progress(stage="measure", done=done, total=2, message=f"block {done}"))
        emit(Notice(kind="fallback", subject="layer 3", message="a dividing group of 48 was used"))
        if self.error is not None:
            raise self.error
        if command == "compare":
            return CompareOutcome(comparison=synthetic.make_comparison(), out=settings.out)
        summary = replace(synthetic.make_summary(blocks=4), command=command)
        reports = {"html": Path("out/report.html")} if command != "eval" else {}
        return OUTCOMES[command](summary=summary, out=settings.out, reports=reports)

    def module(self) -> ModuleType:
        module = ModuleType("cptq.pipeline")
        for name, command in COMMANDS.items():
            setattr(module, name, self._function(command))
        return module

    def _function(self, command: str) -> Callable[[Any, Emit], Any]:
        return lambda settings, emit: self.run(command, settings, emit)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    found = FakePipeline()
    monkeypatch.setitem(sys.modules, "cptq.pipeline", found.module())
    monkeypatch.delenv("CPTQ_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def cptq(pipeline: FakePipeline) -> Cptq:
    """Run the command line in a directory of its own."""
    runner = CliRunner(env={"COLUMNS": "80"})
    return lambda *words: runner.invoke(app, [str(word) for word in words])
