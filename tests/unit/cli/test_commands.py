"""The commands against a pipeline that only records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.types import Plan
from tests.unit.cli.conftest import Cptq, FakePipeline
from tests.unit.report import synthetic


def test_compress_passes_the_defaults_and_a_default_place(
    cptq: Cptq, pipeline: FakePipeline
) -> None:
    result = cptq("compress", "org/Some-Model")
    assert result.exit_code == 0, result.output
    assert pipeline.seen == [
        CompressSettings(
            model=ModelSettings(model="org/Some-Model"),
            calibration=CalibrationSettings(),
            out=Path("Some-Model-cptq-4bit"),
        )
    ]


def test_compress_passes_every_option(cptq: Cptq, pipeline: FakePipeline) -> None:
    line = (
        "compress m --target 3.5bpw -o out --metric cca --allocator greedy --compressor nearest"
        " --group-size 32 --bits 3,4,16 --device cuda:1 --dtype bfloat16 --batch-size 2 --seed 5"
        " --revision main --token hf_x --trust-remote-code --cache-dir c --calibration pydoc"
        " --samples 7 --seqlen 128 --data-dir d --overwrite --allow-pickle --format quiet"
    )
    result = cptq(*line.split())
    assert result.exit_code == 0, result.output
    assert pipeline.seen == [
        CompressSettings(
            model=ModelSettings(
                model="m", device="cuda:1", dtype="bfloat16", revision="main", token="hf_x",
                trust_remote_code=True, cache_dir=Path("c"), allow_pickle=True,
            ),
            calibration=CalibrationSettings(
                calibration="pydoc", data_dir=Path("d"), samples=7, seqlen=128, batch_size=2, seed=5
            ),
            target="3.5bpw", metric="cca", allocator="greedy", compressor="nearest",
            bits=(3, 4, 16), group_size=32, out=Path("out"), overwrite=True,
        )
    ]  # fmt: skip


def test_analyze_takes_several_metrics_or_all(cptq: Cptq, pipeline: FakePipeline) -> None:
    assert cptq("analyze", "m", "--metric", "cca", "--metric", "output").exit_code == 0
    assert pipeline.seen[-1].metrics == ("cca", "output")
    assert pipeline.seen[-1].out == Path("m-analysis")
    assert cptq("analyze", "m", "--metric", "all").exit_code == 0
    assert {"cca", "pruning", "taylor", "output"} <= set(pipeline.seen[-1].metrics)
    assert "all" not in pipeline.seen[-1].metrics
    assert cptq("analyze", "m").exit_code == 0
    assert pipeline.seen[-1].metrics == ("output",)


def test_eval_takes_several_tasks(cptq: Cptq, pipeline: FakePipeline) -> None:
    line = "eval m --task wikitext --task glue/sst2 --baseline dense --limit 0.5 --seqlen 512"
    result = cptq(*line.split(), "-o", "r.json")
    assert result.exit_code == 0, result.output
    settings = pipeline.seen[-1]
    assert settings.tasks == ("wikitext", "glue/sst2")
    assert (settings.baseline, settings.limit, settings.seqlen) == ("dense", 0.5, 512)
    assert settings.out == Path("r.json")


def test_a_config_file_yields_to_the_line(cptq: Cptq, pipeline: FakePipeline) -> None:
    Path("run.yaml").write_text("target: 3bit\nsamples: 5\nbits: [3, 4]\n")
    assert cptq("compress", "m", "--config", "run.yaml", "--samples", "6").exit_code == 0
    settings = pipeline.seen[-1]
    assert (settings.target, settings.calibration.samples, settings.bits) == ("3bit", 6, (3, 4))
    assert settings.out == Path("m-cptq-3bit")


def test_a_plan_takes_the_place_of_the_target(cptq: Cptq, pipeline: FakePipeline) -> None:
    plan = synthetic.make_summary(blocks=1).plan
    assert isinstance(plan, Plan)
    Path("mine.json").write_text(json.dumps(plan.to_dict()))
    assert cptq("compress", "m", "--plan", "mine.json").exit_code == 0
    assert pipeline.seen[-1].target is None
    assert pipeline.seen[-1].out == Path("m-cptq-mine")


def test_compress_tells_bytes_bits_widths_and_where(cptq: Cptq) -> None:
    result = cptq("compress", "m")
    for words in (
        "269,060,552 bytes", "111,998,320 bytes", "41.6% of dense", "nominal bits", "4.250",
        "6.660", "predicted loss", "0.1834", "w4g64", "verified", "outputs equal", "1 fallback",
        "m-cptq-4bit", "out/report.html",
    ):  # fmt: skip
        assert words in result.stdout, words
    assert "fallback: layer 3: a dividing group of 48 was used" in result.stderr
    assert "measure" in result.stderr
    assert not set(result.stderr.splitlines()) & set(result.stdout.splitlines())
    for words in ("Before and after", "top-1", "Speed and memory", "own loop"):
        assert " ".join(words.split()) in " ".join(result.stdout.split()), words


def test_analyze_tells_the_most_sensitive_and_a_sketch(cptq: Cptq) -> None:
    result = cptq("analyze", "m")
    assert "Most sensitive by output" in result.stdout
    assert "model.layers.0.mlp.down_proj" in result.stdout
    assert "Sensitivity over the blocks (0 to 3)" in result.stdout
    assert "█" in result.stdout


def test_eval_tells_the_difference_to_the_baseline(cptq: Cptq) -> None:
    lines = cptq("eval", "m").stdout.splitlines()
    row = next(line.split() for line in lines if "token perplexity" in line)
    assert row[3:7] == ["31.92", "27.05", "+4.87", "worse"]


@pytest.mark.parametrize("command", ["analyze", "compress", "eval"])
def test_it_fits_in_80_columns(cptq: Cptq, command: str) -> None:
    for line in cptq(command, "m").stdout.splitlines():
        assert len(line) <= 80


@pytest.mark.parametrize("command", ["analyze", "compress", "eval"])
def test_json_is_one_document(cptq: Cptq, command: str) -> None:
    result = cptq(command, "m", "--format", "json")
    document = json.loads(result.stdout)
    assert document["command"] == command
    assert document["summary"]["model"]["source"] == "smollm2-135m"
    assert document["summary"]["plan"]["choices"]
    assert "fallback" in result.stderr


def test_quiet_prints_just_the_path_or_the_number(cptq: Cptq) -> None:
    compressed = cptq("compress", "m", "--format", "quiet")
    assert (compressed.stdout, compressed.stderr) == ("m-cptq-4bit\n", "")
    evaluated = cptq("eval", "m", "--format", "quiet")
    assert [float(line) for line in evaluated.stdout.splitlines()] == [27.05 * 1.18, 0.9048]
    assert evaluated.stderr == ""


def test_no_name_steers_the_terminal(cptq: Cptq, pipeline: FakePipeline) -> None:
    Path("evil\x1b[31m.yaml").write_text("- x")
    result = cptq("compress", "m", "--config", "evil\x1b[31m.yaml")
    assert result.exit_code == 2
    assert "\x1b" not in result.output
