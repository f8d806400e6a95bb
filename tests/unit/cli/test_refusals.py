"""What is refused before the pipeline runs: one sentence, its type and the value that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cptq.cli.app import main
from tests.unit.cli.conftest import Cptq, FakePipeline
from tests.unit.report import synthetic


@pytest.fixture
def files(pipeline: FakePipeline) -> None:
    """A plan, an analysis, a config file and a directory of someone else, in the current one."""
    plan = synthetic.make_summary(blocks=1).plan
    assert plan is not None
    Path("plan.json").write_text(json.dumps(plan.to_dict()))
    Path("run.yaml").write_text("samlpes: 3\n")
    Path("a/sensitivity").mkdir(parents=True)
    Path("a/sensitivity/output.json").write_text("{}")
    Path("there/model").mkdir(parents=True)
    Path("there/file.txt").write_text("mine")


#: line -> the error's type, and words that its sentence must hold: the value and the way out
REFUSED = {
    "compress": ("UsageError", "no model is given", "Hub id"),
    "compress m --metric outptu": ("UnknownNameError", "'outptu'", "'output'"),
    "analyze m --metric tailor": ("UsageError", "'tailor'", "'taylor'"),
    "analyze m --metric al": ("UsageError", "'al'", "'all'"),
    "compress m --allocator knapsak": ("UnknownNameError", "'knapsak'", "'knapsack'"),
    "analyze m --validate --allocator evn": ("UnknownNameError", "'evn'", "'even'"),
    "compress m --compressor gtpq": ("UnknownNameError", "'gtpq'", "'gptq'"),
    "compress m --target banana": ("BudgetError", "'banana'", "allowed"),
    "compress m --bits 4,9": ("UsageError", "--bits", "9", "2, 3, 4"),
    "compress m --bits four": ("UsageError", "--bits", "'four'", "whole number"),
    "compress m --samples 0": ("UsageError", "--samples", "0", "at least 1"),
    "compress m --seed 9223372036854775808": ("UsageError", "--seed", "9223372036854775807"),
    "compress m --refine -3": ("UsageError", "--refine", "-3", "at least 0"),
    "compress m --tune --tune-minutes 0": ("UsageError", "--tune-minutes", "0", "at least 1"),
    "compress m --tune-minutes 5": ("UsageError", "--tune-minutes", "add --tune"),
    "compress m --dtype int8": ("UsageError", "--dtype", "'int8'", "bfloat16"),
    "compress m --device gpu": ("UsageError", "--device", "'gpu'", "cuda"),
    "compress m --calibration wikitxt": ("UnknownNameError", "'wikitxt'", "'wikitext'"),
    "compress m --config absent.yaml": ("UsageError", "absent.yaml", "No such file"),
    "compress m --config run.yaml": ("UsageError", "run.yaml", "'samlpes'", "'samples'"),
    "compress m --plan absent.json": ("PlanError", "absent.json", "no such file"),
    "compress m --plan absent.json --target 4bit": ("UsageError", "--target", "--plan"),
    "compress m --plan plan.json --pin down=8bit": ("UsageError", "--pin", "--plan"),
    "compress m --plan plan.json --embedding-bits 8 --runtime cptq": (
        "UsageError",
        "--embedding-bits",
        "--plan",
    ),
    "compress m --sensitivity a.json --metric cca": ("UsageError", "--metric", "--sensitivity"),
    "compress m --sensitivity no.json": ("PlanError", "--sensitivity no.json", "cptq analyze"),
    "analyze m --sensitivity no": ("PlanError", "--sensitivity no", "cptq analyze"),
    "compress m --sensitivity a": ("PlanError", "--sensitivity a", "a/sensitivity/output.json"),
    "compress m --sparsity 2:9 --runtime cptq": ("UsageError", "--sparsity", "'2:9'", "2:4"),
    "analyze m --sparsity 50%": ("UsageError", "--sparsity", "transformers", "--runtime cptq"),
    "analyze m --pairs 9": ("UsageError", "--pairs", "--validate"),
    "analyze m --target 3bit": ("UsageError", "--target", "--validate"),
    "eval m --task wikitxt": ("UnknownNameError", "'wikitxt'", "'wikitext'"),
    "eval m --limit 0": ("UsageError", "--limit", "0"),
    "eval m -o .": ("OutputExistsError", ".", "--overwrite"),
    "compress m -o there": ("OutputExistsError", "there", "--overwrite"),
    "compress m -o there --overwrite": ("UsageError", "there", "-o"),
    "compress there -o there --overwrite": ("UsageError", "there", "the model itself"),
    "compress there/model -o there --overwrite": ("UsageError", "there", "the model itself"),
    "compress m -o there/file.txt/x": ("UsageError", "there/file.txt/x", "cannot be written"),
    "compare": ("UsageError", "no model is given", "Hub id"),
    "compare a": ("UsageError", "only one model"),
    "compare a a": ("UsageError", "twice"),
    "compare a absent.json": ("UsageError", "'absent.json'", "cptq eval"),
    "compare a b --task wikitex": ("UnknownNameError", "'wikitex'", "'wikitext'"),
    "compare a b --limit 1.5": ("UsageError", "--limit", "1.5"),
    "compare a b -o there": ("OutputExistsError", "there", "--overwrite"),
    "compare a b -o there --overwrite": ("UsageError", "there", "-o"),
    "inspect": ("UsageError", "no path is given", ".gguf"),
    "verify": ("UsageError", "no artifact is given", "cptq"),
    "export --format gguf": ("UsageError", "no artifact is given", "cptq"),
    "export a": ("UsageError", "--format", "gguf"),
    "export a --format ggu": ("UnknownNameError", "'ggu'", "'gguf'"),
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_sentence_before_the_pipeline(
    cptq: Cptq, pipeline: FakePipeline, line: str
) -> None:
    kind, *words = REFUSED[line]
    result = cptq(*line.split(), "--print" if line.startswith("export") else "--format", "json")
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == kind
    assert result.exit_code == error["exit_code"] == (1 if kind == "PlanError" else 2)
    assert result.stderr == f"Error: {error['message']}\n"
    for word in words:
        assert word in error["message"]
    assert pipeline.seen == []
    assert Path("there/file.txt").read_text() == "mine"


@pytest.mark.usefixtures("files")
def test_people_and_scripts_read_it_on_stderr_alone(cptq: Cptq) -> None:
    for shape in ("human", "quiet"):
        result = cptq("compress", "m", "--samples", "0", "--format", shape)
        assert result.stdout == ""
        assert result.stderr.startswith("Error: --samples is 0")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"choices": {}}', '"text"', "null"])
def test_a_file_that_is_not_a_plan(cptq: Cptq, pipeline: FakePipeline, text: str) -> None:
    Path("plan.json").write_text(text)
    result = cptq("compress", "m", "--plan", "plan.json", "--format", "json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "PlanError"
    assert "plan.json" in error["problem"]
    assert pipeline.seen == []


#: lines that Typer itself cannot read -> the words that must be named
UNREADABLE = {
    "compress m --taget 4bit": ("--taget", "--target", "cptq compress --help"),
    "compress m --samples many": ("--samples", "'many'", "a whole number"),
    "eval m --limit some": ("--limit", "'some'", "a number"),
    "compress m --refine": ("--refine", "cptq compress --help"),
    "compress m n": ("n", "cptq compress --help"),
    "frobnicate": ("'frobnicate'", "cptq --help"),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("line", UNREADABLE)
def test_a_line_that_cannot_be_read(
    line: str,
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cptq.cli.app.set_defaults", lambda environ: None)
    monkeypatch.setattr("cptq.cli.app.silence_libraries", lambda: None)
    command, *rest = line.split()
    with pytest.raises(SystemExit) as raised:
        main([command, *(["--format", "json"] if as_json else []), *rest])
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    for word in UNREADABLE[line]:
        assert word in err
    assert (json.loads(out)["error"]["exit_code"] == 2) if as_json else out == ""


def test_a_wrong_output_format_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["compress", "m", "--format", "xml"])
    assert raised.value.code == 2
    err = capsys.readouterr().err
    for word in ("--format", "'xml'", "human", "json", "quiet"):
        assert word in err
