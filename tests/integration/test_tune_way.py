"""`compress --tune`: what is written is what was tuned, and stock transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cptq.compression.tuned_parts import RATES
from cptq.config import CalibrationSettings, CompressSettings, ExportSettings, ModelSettings
from cptq.errors import CalibrationError, UsageError
from cptq.pipeline import compress, export
from cptq.pipeline import tune as tuning
from cptq.report.summary import CompressOutcome
from cptq.types import Notice
from tests.conftest import Heard, TinyModel

CALIBRATION = CalibrationSettings(calibration="pydoc", samples=16, seqlen=64, batch_size=4)


@pytest.fixture(scope="module", autouse=True)
def in_short(same_process: None, short_manual: None) -> Iterator[None]:
    """Few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "STEPS", 16)
        patch.setattr("cptq.compression.tune.CHECK_EVERY", 4)
        yield


def run(model: Path, out: Path, heard: Heard, **more: Any) -> CompressOutcome:
    wanted: dict[str, Any] = {
        "calibration": CALIBRATION, "group_size": 16, "compressor": "nearest", "target": "3bit",
        "check_uniform": False, "tune": True,
    }  # fmt: skip
    settings = CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)
    return compress(settings, heard)


def told(heard: Heard) -> list[Notice]:
    return [e for e in heard if isinstance(e, Notice) and e.subject == "--tune"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One plan carried out without and with tuning, and what was heard of the latter."""

    source: Path
    folder: Path
    plain: CompressOutcome
    tuned: CompressOutcome
    heard: Heard

    def read(self, name: str) -> list[Any]:
        """The JSON file of that name in either."""
        return [json.loads((self.folder / x / name).read_text()) for x in ("plain", "tuned")]


@pytest.fixture(scope="module")
def pair(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory, in_short: None) -> Pair:
    source, folder, heard = (
        tiny_model("llama", dtype=torch.bfloat16),
        tmp_path_factory.mktemp("pair"),
        Heard(),
    )
    plain = run(source, folder / "plain", Heard(), tune=False)
    same = {"plan": folder / "plain/plan.json", "target": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "STEPS", 32)  # after fewer, few narrow scales have moved
        tuned = run(source, folder / "tuned", heard, **same)
    return Pair(source=source, folder=folder, plain=plain, tuned=tuned, heard=heard)


def test_tuned_norms_and_scales_are_in_the_file_that_stock_transformers_loads(pair: Pair) -> None:
    plain, tuned, folder = pair.plain, pair.tuned, pair.folder
    assert plain.artifact is not None
    assert tuned.artifact is not None
    assert tuned.artifact.weight_bytes == plain.artifact.weight_bytes
    before, after, dense = (
        load_file(path / "model.safetensors")
        for path in (folder / "plain", folder / "tuned", pair.source)
    )
    assert {n: (x.dtype, x.shape) for n, x in after.items()} == {
        n: (x.dtype, x.shape) for n, x in before.items()
    }
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    record = tuned.artifact.manifest["tuned"]
    norms = {name for name in dense if dense[name].dim() == 1}
    assert norms == set(record["dense_tensors"])
    scales = {name for name in after if name.endswith("weight_scale")}
    assert norms < changed <= norms | scales
    assert len(changed & scales) > len(scales) / 2  # narrow scales move in large steps
    loaded = AutoModelForCausalLM.from_pretrained(folder / "tuned").state_dict()
    for name in norms:
        assert torch.equal(loaded[name].bfloat16(), after[name])
    assert record["after"] < record["before"]
    (note,) = told(pair.heard)
    assert note.kind == "info"
    assert "the divergence from the dense model fell from" in note.message
    assert note.message in (folder / "tuned/report.md").read_text()
    assert "Tuned on the calibration text in 32 steps" in (folder / "tuned/README.md").read_text()
    assert "tuned" not in plain.artifact.manifest
    first, second = pair.read("plan.json")
    assert first == second


@pytest.mark.parametrize("arch", ["bert-encoder", pytest.param("bert", marks=pytest.mark.slow)])
def test_classifiers_and_encoders_are_tuned(
    arch: str, tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    many = replace(CALIBRATION, samples=64)
    outcome = run(tiny_model(arch), tmp_path / "out", heard, target="2bit", calibration=many)
    (note,) = told(heard)
    assert note.kind == "info", note.message
    assert ("example" if arch == "bert" else "half squared distance per sentence") in note.message
    assert outcome.artifact is not None
    assert outcome.artifact.manifest["verification"]["max_abs_difference"] < 1e-4


@pytest.mark.slow
def test_what_llamacpp_reads_can_be_exported(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    """Asymmetric grids whose offsets float16 must hold, packed embeddings, and the GGUF of it."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    source = tiny_model("llama", dtype=torch.bfloat16, **sizes)
    more = {"runtime": "llamacpp", "group_size": 32, "asymmetric": True, "embedding_bits": 8}
    run(source, tmp_path / "out", heard, target="6bit", bits=(4, 5, 8), compressor="gptq", **more)
    assert [note.kind for note in told(heard)] == ["info"]
    done = export(
        ExportSettings(artifact=tmp_path / "out", format="dense", out=tmp_path / "dense"), heard
    )
    manifest = json.loads((tmp_path / "out/cptq.json").read_text())
    assert done.artifact.manifest["tuned"] == manifest["tuned"]
    export(ExportSettings(artifact=tmp_path / "out", format="gguf", out=tmp_path / "gguf"), heard)


def test_the_better_of_two_plans_is_tuned(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    more = {"scales": "16bit", "embedding_bits": 16}
    run(tiny_model("llama"), tmp_path / "out", heard, check_uniform=True, target="2.6bit", **more)
    subjects = [event.subject for event in heard if isinstance(event, Notice)]
    assert subjects.index("--check-uniform") < subjects.index("--tune")


def test_errors_are_those_of_the_tuned_layers(pair: Pair) -> None:
    rows = [manifest["layers"] for manifest in pair.read("cptq.json")]
    grown = 0
    for before, after in zip(*rows, strict=True):
        assert before["name"] == after["name"]
        if before["name"] in ("lm_head", "model.embed_tokens"):
            assert after == before
            continue
        assert before["nbytes"] == after["nbytes"]
        assert after["held_out"]
        # rounding to nearest had about the smallest error of the weights that there is
        assert 0 < 0.99 * before["weight_error"] < after["weight_error"] < 0.5
        assert after["output_error"] != before["output_error"]
        grown += after["weight_error"] > before["weight_error"]
    assert grown > len(rows[0]) / 2


def test_a_plan_without_compressed_layers_has_nothing_to_tune(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    outcome = run(tiny_model("llama"), tmp_path / "out", heard, bits=(16,), target="16bit")
    (note,) = told(heard)
    assert (note.kind, note.message) == (
        "warning",
        "the plan keeps every linear dense: nothing to tune",
    )
    assert outcome.artifact is not None
    assert "tuned" not in outcome.artifact.manifest


def test_when_nothing_is_better_that_is_said(
    pair: Pair, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RATES, "token", 1e9)
    outcome = run(pair.source, tmp_path / "out", heard)
    (note,) = told(heard)
    assert note.kind == "warning"
    assert "no better state was found" in note.message
    assert outcome.artifact is not None
    assert "tuned" not in outcome.artifact.manifest
    files = [path / "model.safetensors" for path in (pair.folder / "plain", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_run_that_is_cut_short_says_so(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEPS", 10**6)
    tune = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *args, **more: tune(*args, **more | {"seconds": 1}))
    run(tiny_model("llama"), tmp_path / "out", heard, tune_minutes=3)
    first, second = told(heard)
    assert first.kind == "warning"
    assert "of 1000000 steps fitted into 3 minutes" in first.message
    assert second.kind == "info"


def test_without_text_to_choose_by_it_is_refused(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("\n".join(f"Line {k} tells of the number {k * k}." for k in range(60)))
    short = CalibrationSettings(calibration=str(text), samples=1000, seqlen=32)
    with pytest.raises(CalibrationError, match="leaves 0 samples to judge with, and 1 are needed"):
        run(tiny_model("llama"), tmp_path / "out", heard, calibration=short)


def test_minutes_without_tuning_are_refused() -> None:
    with pytest.raises(UsageError, match="--tune-minutes has no effect without --tune"):
        CompressSettings(model=ModelSettings(model="m"), calibration=CALIBRATION, tune_minutes=3)
