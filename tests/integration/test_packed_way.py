"""`cptq compress --runtime cptq` from settings to a verified artifact; a plan edited by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import PlanError, UsageError
from cptq.inference.modules import find_packed_modules
from cptq.pipeline import compress
from cptq.types import Event
from tests.conftest import TinyModel
from tests.tiny_models import SENTENCES

pytestmark = pytest.mark.usefixtures("same_process")


def settings(model: Path, out: Path, **options: Any) -> CompressSettings:
    text = out.parent / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    return CompressSettings(
        model=ModelSettings(model=str(model), device="cpu"),
        calibration=CalibrationSettings(calibration=str(text), samples=4, seqlen=32),
        out=out,
        runtime="cptq",
        allocator="uniform",
        **options,
    )


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_everything_is_packed_within_the_budget(
    tiny_model: TinyModel, tmp_path: Path, arch: str, asymmetric: bool
) -> None:
    source = tiny_model(arch, dtype=torch.float16)
    asked = settings(
        source, tmp_path / "out", asymmetric=asymmetric, embedding_bits=8, target="7bit"
    )
    outcome = compress(asked, lambda event: None)
    artifact, report = outcome.artifact, outcome.summary
    assert report.size is not None
    assert artifact.weight_bytes == report.size.file_bytes
    assert artifact.weight_bytes == (artifact.path / "cptq.safetensors").stat().st_size
    assert artifact.weight_bytes <= artifact.manifest["plan"]["budget"]["limit_bytes"]
    assert artifact.manifest["verification"]["max_abs_difference"] < 1e-4
    model = cptq.load(artifact.path, device="cpu")
    packed = find_packed_modules(model)
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}[arch]
    planned = {layer.name for unit in report.units for layer in unit.layers}
    assert set(packed) >= planned | {embedding}
    assert packed[embedding].scheme.bits == 8
    assert all(m.scheme.symmetric is not asymmetric for m in packed.values())


def test_a_plan_may_ask_for_sparse_layers(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", dtype=torch.float16)
    first = compress(settings(source, tmp_path / "out"), lambda event: None)
    plan = json.loads((first.out / "plan.json").read_text())
    labels = ["w4g16-s50", "w4g16-2:4", "w3g16-asym-s60"]
    for unit, label in zip(plan["choices"], labels, strict=False):
        plan["choices"][unit] = label
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    events: list[Event] = []
    again = compress(settings(source, tmp_path / "sparse", plan=file), events.append)
    assert again.artifact.manifest["verification"]["max_abs_difference"] < 1e-4
    config = json.loads((again.out / "config.json").read_text())["quantization_config"]
    found = {label.partition("-")[2] for label in config["modules"].values()}
    assert found >= {"s50", "2:4", "asym-s60"}
    asked = settings(source, tmp_path / "refused", plan=file)
    with pytest.raises(PlanError, match="sparse"):
        compress(replace(asked, runtime="transformers"), events.append)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"asymmetric": True}, "transformers.*--asymmetric"),
        ({"embedding_bits": 8, "runtime": "vllm", "bits": (4, 8)}, "vllm.*--embedding-bits"),
        ({"embedding_bits": 2, "runtime": "cptq"}, "--embedding-bits is 2; allowed: 3, 4, 5, 6"),
        ({"embedding_bits": 4}, "--embedding-bits is 4; allowed: 8, 16 with --runtime transf"),
    ],
)
def test_options_that_the_runtime_does_not_take(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CompressSettings(
            model=ModelSettings(model="x"), calibration=CalibrationSettings(), **options
        )
