"""The three commands on real and tiny models, from settings to files on the disk."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cptq.artifact import reload
from cptq.config import (
    AnalyzeSettings,
    CalibrationSettings,
    CompressSettings,
    EvalSettings,
    ModelSettings,
)
from cptq.errors import ArtifactError, ModelError, OutputExistsError, PlanError
from cptq.pipeline import analyze, compress, evaluate
from cptq.report import CompressOutcome
from cptq.types import Candidate, Event, Notice
from tests.conftest import TinyModel
from tests.tiny_models import RECIPES

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
CALIBRATION = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)
#: a causal model, an encoder, and one without a description of its family
KINDS = ("llama", "bert", "generic")
FAMILIES = [
    pytest.param(arch, marks=() if arch in KINDS else pytest.mark.slow)
    for arch in sorted(set(RECIPES) - {"gpt2"})
]


def settings(model: Path, out: Path, **more: Any) -> CompressSettings:
    return CompressSettings(
        model=ModelSettings(model=str(model)), calibration=CALIBRATION, out=out, **more
    )


def quiet(_event: Event) -> None: ...


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def stories_4bit(
    stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompressOutcome]:
    """stories260k in the default way."""
    out = tmp_path_factory.mktemp("whole") / "small"
    return out, compress(settings(stories, out), quiet)


def test_an_artifact_has_what_its_report_says(stories_4bit: tuple[Path, CompressOutcome]) -> None:
    out, outcome = stories_4bit
    report = json.loads((out / "report.json").read_text())
    size = (out / "model.safetensors").stat().st_size
    assert size == report["size"]["file_bytes"] == outcome.summary.plan.predicted_bytes
    assert size <= report["budget"]["limit_bytes"]
    assert report["verification"]["max_abs_difference"] == 0.0
    assert set(report["timings"]) >= {"load", "calibration", "sensitivity", "compression"}
    assert len(report["results"]) == 36  # 35 linears and the embedding, which is the head as well
    labels = {line["name"]: line["candidate"] for line in report["results"]}
    assert labels.pop("model.embed_tokens") == "f8e4m3"
    widths = [Candidate.parse(label).bits for label in labels.values()]
    assert 3.5 <= sum(widths) / len(widths) <= 4.5
    for name in ("report.md", "report.html", "plan.json", "cptq.json", "tokenizer.json"):
        assert (out / name).stat().st_size > 100
    # down_proj has 172 inputs, which neither 64 nor 32 divides
    fallbacks = [n["subject"] for n in report["notices"] if n["kind"] == "fallback"]
    assert [name.split(".")[-1] for name in fallbacks] == ["down_proj"] * 5


def test_a_process_with_transformers_alone_gets_the_same_logits(
    stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    out, _ = stories_4bit
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(2, 62)[None]\n"
        "torch.save(model(ids).logits, sys.argv[2])\n"
        "assert not [name for name in sys.modules if name.startswith('cptq')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), str(tmp_path / "logits")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits")
    dense = AutoModelForCausalLM.from_pretrained(out)  # and here, after cptq was imported
    with torch.no_grad():
        torch.testing.assert_close(found, dense(torch.arange(2, 62)[None]).logits)


def test_the_plan_replays_to_the_same_bytes(
    stories: Path, stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    out, _ = stories_4bit
    again = tmp_path / "again"
    compress(settings(stories, again, target=None, plan=out / "plan.json"), quiet)
    assert sha256(again / "model.safetensors") == sha256(out / "model.safetensors")


def test_a_measurement_is_reused(
    stories: Path, stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    out, first = stories_4bit
    table = out / "sensitivity" / "output.json"
    outcome = compress(settings(stories, tmp_path / "b", sensitivity=table), quiet)
    assert outcome.summary.plan == first.summary.plan
    assert "sensitivity" not in outcome.summary.timings


def test_a_foreign_or_stale_measurement_is_refused(
    tiny_model: TinyModel, stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    table = stories_4bit[0] / "sensitivity" / "output.json"
    with pytest.raises(PlanError, match=r"output\.json was measured on another model"):
        compress(settings(tiny_model("llama"), tmp_path / "x", sensitivity=table), quiet)
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps(json.loads(table.read_text()) | {"schema": 0}))
    with pytest.raises(PlanError, match=r"stale\.json holds no sensitivity table: its schema is 0"):
        compress(settings(tiny_model("llama"), tmp_path / "x", sensitivity=stale), quiet)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_goes_the_whole_way(tiny_model: TinyModel, tmp_path: Path, arch: str) -> None:
    out = tmp_path / "small"
    outcome = compress(settings(tiny_model(arch), out, target="3.5bit", group_size=16), quiet)
    assert outcome.summary.verification is not None
    assert outcome.summary.verification.clean
    packed = [line for line in outcome.summary.results if not line.candidate.float8]
    assert len(packed) == len(load_file(out / "model.safetensors").keys() & {
        f"{line.name}.weight_packed" for line in packed
    })  # fmt: skip
    names = {line.name for line in outcome.summary.results} - {line.name for line in packed}
    assert all(name.endswith(("embed_tokens", "word_embeddings", "lm_head")) for name in names)


def test_gpt2_is_refused_with_the_reason(tiny_model: TinyModel, tmp_path: Path) -> None:
    heard: list[Event] = []
    for allocator in ("knapsack", "uniform"):  # the second measures nothing that could refuse
        asked = settings(tiny_model("gpt2"), tmp_path / "small", allocator=allocator)
        with pytest.raises(ModelError, match=r"no layer that can be compressed.*--runtime cptq"):
            compress(asked, heard.append)
    told = [event for event in heard if isinstance(event, Notice) and event.kind == "skipped"]
    assert any("Conv1D" in event.message for event in told)
    assert list(tmp_path.iterdir()) == []


def test_uniform_measures_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    asked = settings(tiny_model("llama"), tmp_path / "u", group_size=16, allocator="uniform")
    outcome = compress(asked, quiet)
    labels = {line.name: line.candidate.label for line in outcome.summary.results}
    vocabulary = {labels.pop(name) for name in ("model.embed_tokens", "lm_head")}
    assert vocabulary == {"f8e4m3"}
    assert len(set(labels.values())) == 1
    assert outcome.summary.sensitivity == {}


def test_the_loss_stands_in_report_and_card_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, made = tiny_model("llama"), {}
    for asked in (True, False):
        out = tmp_path / str(asked)
        more = {"allocator": "uniform", "group_size": 16, "evaluate": asked}
        made[asked] = compress(settings(model, out, **more), quiet).summary
        assert ("| KL |" in (out / "README.md").read_text(encoding="utf-8")) is asked
    for name in ("cptq.json", "model.safetensors"):
        assert sha256(tmp_path / "True" / name) == sha256(tmp_path / "False" / name)
    quality = made[True].quality
    assert quality is not None
    kl = quality.measures[0]
    assert kl.name == "KL"
    assert kl.interval is not None
    assert 0 < kl.interval[0] < kl.value < kl.interval[1]
    assert not quality.chose_plan
    assert made[False].quality is None


def test_a_failed_verification_leaves_no_artifact(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
        shape = load_file(job["inputs"])["input_ids"].shape
        save_file({"answer": torch.zeros(*shape, 300)}, job["answer"])
        found: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": [], "cptq": []}
        return found | {"weight_bytes": 0}

    monkeypatch.setattr(reload, "_run", wrong)
    asked = settings(tiny_model("llama"), tmp_path / "x", group_size=16, compressor="nearest")
    with pytest.raises(ArtifactError, match="answers differently from the one in memory"):
        compress(asked, quiet)
    # the finished steps stay; the draft does not
    (left,) = tmp_path.iterdir()
    assert left.name == ".x.cptq-run"
    assert not list(left.glob(".*"))


def test_a_full_disk_is_told_before_the_work(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    module = sys.modules["cptq.pipeline.inputs"]
    monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("too late"))
    with pytest.raises(ArtifactError, match="the disk is full"):
        compress(settings(tiny_model("llama"), tmp_path / "x", group_size=16), quiet)


def test_existing_output_is_refused_before_the_work(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("inputs", "analyze"):
        module = sys.modules[f"cptq.pipeline.{name}"]  # the package's `analyze` is the function
        monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("too late"))
    model = tiny_model("llama")
    with pytest.raises(OutputExistsError):
        compress(settings(model, tmp_path, group_size=16), quiet)
    with pytest.raises(OutputExistsError):
        analyze(
            AnalyzeSettings(
                model=ModelSettings(model=str(model)), calibration=CALIBRATION, out=tmp_path
            ),
            quiet,
        )


def test_analyze_writes_every_table(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    metrics = ("output", "taylor", "pruning")
    analyze(
        AnalyzeSettings(
            model=ModelSettings(model=str(tiny_model("qwen2"))),
            calibration=CALIBRATION,
            metrics=metrics,
            group_size=16,
            scales="16bit",
            out=out,
        ),
        quiet,
    )
    layers = json.loads((out / "layers.json").read_text())
    for metric in metrics:
        table = json.loads((out / "sensitivity" / f"{metric}.json").read_text())
        assert set(table["scores"]) == set(layers["units"])
        for unit, row in table["scores"].items():
            least = "w3g16" if unit in ("model.embed_tokens", "lm_head") else "w2g16"
            assert row[least] > row["w8g16"] > row["w16"] == 0
    assert json.loads((out / "report.json").read_text())["command"] == "analyze"


def test_eval_compares_an_artifact_with_its_model(
    stories: Path, stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    outcome = evaluate(
        EvalSettings(
            model=ModelSettings(model=str(stories_4bit[0])),
            tasks=("pydoc",),
            baseline=str(stories),
            limit=2,
            out=out,
        ),
        quiet,
    )
    small, dense = outcome.summary.evaluation[0], outcome.summary.baseline[0]
    assert (small.metric, small.samples) == (dense.metric, dense.samples) == ("perplexity", 2)
    assert small.value != dense.value
    # 256 tokens calibrate and 1,022 are judged, so the draw of the text decides by several percent
    assert small.value == pytest.approx(dense.value, rel=0.25)
    assert outcome.summary.model.parameters == 260_032
    assert json.loads(out.read_text())["baseline"][0]["value"] == dense.value


def test_an_artifact_is_not_compressed_again(
    stories_4bit: tuple[Path, CompressOutcome], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="is compressed already"):
        compress(settings(stories_4bit[0], tmp_path / "x"), quiet)
