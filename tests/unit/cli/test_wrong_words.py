"""Options that cannot be meant: one sentence each, before a model is looked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.unit.cli.conftest import FakePipeline
from tests.unit.report import synthetic

Cptq = Callable[..., Result]


@pytest.fixture
def files(pipeline: FakePipeline) -> None:
    """A plan and an analysis in the current directory."""
    plan = synthetic.make_summary(blocks=1).plan
    assert plan is not None
    Path("plan.json").write_text(json.dumps(plan.to_dict()))
    Path("a/sensitivity").mkdir(parents=True)
    Path("a/sensitivity/output.json").write_text("{}")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("compress m --refine -3", 2, "--refine is -3; allowed: a whole number of at least 0"),
        (
            "compress m --plan plan.json --pin down=8bit",
            2,
            "a plan already says what every layer gets, so --pin would be ignored; leave out "
            "--pin, or --plan",
        ),
        (
            "compress m --plan plan.json --embedding-bits 8 --runtime cptq",
            2,
            "a plan already says what every layer gets, so --embedding-bits would be ignored; "
            "leave out --embedding-bits, or --plan",
        ),
        (
            "compress m --sensitivity nowhere.json",
            1,
            "--sensitivity nowhere.json is not there; cptq analyze MODEL -o DIR writes "
            "DIR/sensitivity/METRIC.json",
        ),
        (
            "analyze m --sensitivity nowhere",
            1,
            "--sensitivity nowhere is not there; cptq analyze MODEL -o DIR writes "
            "DIR/sensitivity/METRIC.json",
        ),
        (
            "compress m --sensitivity a",
            1,
            "--sensitivity a is a directory; name one of its tables, such as "
            "a/sensitivity/output.json",
        ),
        (
            "compress m --sparsity 2:3 --runtime cptq",
            2,
            "--sparsity holds '2:3'; allowed: 2:4, and shares such as 50%, from 1% to 99%",
        ),
        (
            "analyze m --sparsity 50%",
            2,
            "--sparsity makes what --runtime transformers does not load; allowed: --runtime cptq",
        ),
    ],
)
def test_one_sentence_and_no_work(
    cptq: Cptq, pipeline: FakePipeline, line: str, code: int, sentence: str
) -> None:
    result = cptq(*line.split())
    assert result.exit_code == code
    assert result.stderr == f"Error: {sentence}\n"
    assert pipeline.seen == []


@pytest.mark.usefixtures("files")
def test_analyze_takes_a_whole_directory(cptq: Cptq, pipeline: FakePipeline) -> None:
    assert cptq("analyze", "m", "--sensitivity", "a").exit_code == 0
    assert pipeline.seen[-1].sensitivity == (Path("a"),)
