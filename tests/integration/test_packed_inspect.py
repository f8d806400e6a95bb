"""`cptq inspect` and `cptq verify` on a packed artifact, down to the bytes."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cptq.artifact.inspect import inspect
from cptq.cli.app import app
from cptq.config import CompressSettings
from cptq.pipeline import compress
from tests.integration.test_packed_way import settings
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.usefixtures("same_process")

LABELS = ["w4g16-s50", "w4g16-2:4", "w3g16-asym", "w16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, same_process: None) -> tuple[Path, Path]:
    """A GPT-2 and its artifact: sparse, asymmetric and dense Conv1D, a packed embedding."""
    place = tmp_path_factory.mktemp("packed")
    model = build_tiny_model(place / "model", "gpt2", dtype=torch.float16)
    first = settings(model, place / "first", embedding_bits=8, group_size=16)
    compress(first, lambda event: None)
    plan = json.loads((place / "first" / "plan.json").read_text())
    for k, unit in enumerate(u for u in plan["choices"] if u != "transformer.wte"):
        plan["choices"][unit] = LABELS[k % len(LABELS)]
    (place / "plan.json").write_text(json.dumps(plan))
    asked = settings(model, place / "out", plan=place / "plan.json", target=None)
    assert isinstance(asked, CompressSettings)
    compress(asked, lambda event: None)
    return model, place / "out"


def cptq(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


def test_layers_are_shown_as_what_they_stand_for(made: tuple[Path, Path]) -> None:
    dense, found = inspect(made[0]), inspect(made[1])
    assert found.weights == dense.weights
    assert sum(nbytes for _, nbytes in found.parts.values()) == found.nbytes
    shapes = {layer.name: layer.shape for layer in dense.layers}
    stored = {layer.name: layer.stored for layer in found.layers}
    assert set(stored) == set(shapes)
    assert set(stored.values()) == {*LABELS[:3], "w8g16", "F16"}
    for layer in found.layers:
        turned = layer.shape if layer.name.endswith(("wte", "wpe")) else layer.shape[::-1]
        assert shapes[layer.name] == (turned if layer.stored != "F16" else layer.shape)
        assert layer.bits == pytest.approx(8 * layer.nbytes / prod(layer.shape))
    packed = cptq("inspect", made[1], "--all").stdout
    assert all(len(line) <= 80 for line in packed.splitlines())
    assert all(label in packed for label in LABELS[:3])
    assert f"{dense.weights:,} weights" in " ".join(packed.split())


def test_what_is_not_told_is_not_made_up(made: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(made[1], bare)
    (bare / "cptq.json").unlink()
    told = cptq("inspect", bare)
    assert told.exit_code == 0
    assert "weights not counted" in " ".join(told.stdout.split())
    document = json.loads(cptq("inspect", bare, "--format", "json").stdout)
    assert document["weights"] is None
    bits = {layer["stored"]: layer["bits"] for layer in document["layers"]}
    assert bits["w4g16-2:4"] is None
    assert bits["F16"] == 16


def test_verify_agrees_and_finds_a_flipped_bit(made: tuple[Path, Path], tmp_path: Path) -> None:
    sound = cptq("verify", made[1])
    assert sound.exit_code == 0, sound.output
    assert "is what was written" in sound.stdout
    assert "packed" in sound.stdout
    broken = tmp_path / "broken"
    shutil.copytree(made[1], broken)
    file = broken / "cptq.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    told = cptq("verify", broken)
    assert told.exit_code == 1
    assert "is not what was written (its sha256 differs)" in told.stderr
    assert "Traceback" not in told.stderr
