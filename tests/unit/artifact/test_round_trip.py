"""What is written is what stock transformers loads, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from cptq.allocation.cost import CostModel
from cptq.artifact import reload, stock_load
from cptq.errors import ArtifactError
from cptq.types import Artifact
from tests.conftest import TinyModel
from tests.unit.artifact.builders import compress, load, sample_of, write

CASES: list[Any] = [
    ("llama", {"tied": True, "intermediate_size": 77, "num_hidden_layers": 3}, (32, 0, 64)),
    ("llama", {"tied": False, "dtype": torch.bfloat16}, (16,)),
    ("opt", {"dtype": torch.float16, "ffn_dim": 129}, (32, 0)),
    ("bert", {"hidden_size": 96, "intermediate_size": 131}, (32, 64, 0)),
    ("mpnet", {}, (32,)),
    ("bert-mlm", {}, (32,)),
    ("generic", {}, (32,)),
    ("bert-encoder", {"dtype": torch.float16}, (64,)),
    ("gpt_neox", {}, (32,)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("roberta", {"dtype": torch.float16}, (0, 32)),
            ("mistral", {"dtype": torch.bfloat16}, (0,)),
            ("qwen2", {"dtype": torch.float16}, (32,)),
            ("qwen3", {"dtype": torch.bfloat16}, (16, 0)),
            ("distilbert", {}, (32,)),
        )
    ),
]


def manifest_of(artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((artifact.path / "cptq.json").read_text())
    return found


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loading and comparing without a new process, which takes seconds to import."""

    def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
        (folder / "job.json").write_text(json.dumps(job))
        stock_load.main(str(folder / "job.json"))
        return json.loads(Path(job["report"]).read_text()) | {"cptq": []}

    monkeypatch.setattr(reload, "_run", run)


def assert_round_trip(path: Path, groups: tuple[int, ...], out: Path) -> None:
    model = load(path)
    layers, plan = compress(model, groups=groups)
    artifact = write(model, layers, plan, out, sample=sample_of(model))
    assert artifact.manifest["verification"]["max_abs_difference"] == 0.0
    assert artifact.weight_bytes == plan.predicted_bytes
    assert artifact.weight_bytes == (artifact.path / "model.safetensors").stat().st_size
    assert artifact.weight_bytes == CostModel(model.units, model.tensors).file_bytes(plan.choices)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("arch", "options", "groups"), CASES)
def test_stock_transformers_computes_the_same(
    tiny_model: TinyModel,
    tmp_path: Path,
    arch: str,
    options: dict[str, Any],
    groups: tuple[int, ...],
) -> None:
    assert_round_trip(tiny_model(arch, **options), groups, tmp_path / "out")


def test_in_a_fresh_process_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert_round_trip(tiny_model("llama"), (16, 0), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["stories", "minilm_sst2"])
def test_trained_models_in_a_fresh_process(
    request: pytest.FixtureRequest, tmp_path: Path, trained: str
) -> None:
    assert_round_trip(request.getfixturevalue(trained), (64, 32, 0), tmp_path / "out")


def test_the_file_is_the_one_that_the_library_would_write(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = load(tiny_model("llama", dtype=torch.float16))
    layers, plan = compress(model)
    artifact = write(model, layers, plan, tmp_path / "out")
    path = artifact.path / "model.safetensors"
    assert path.read_bytes() == save(load_file(path), {"format": "pt"})


def test_dense_tensors_are_bit_exact_and_ties_are_written_once(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", tied=True, dtype=torch.float16)
    model = load(source)
    layers, plan = compress(model)
    artifact = write(model, layers, plan, tmp_path / "out")
    before = load_file(source / "model.safetensors")
    after = load_file(artifact.path / "model.safetensors")
    packed = {layer.spec.weight_name for layer in layers}
    assert "lm_head.weight" not in after
    assert set(before) - packed == {
        n for n in after if not n.endswith(("_packed", "_scale", "_shape"))
    }
    for name in set(before) - packed:
        assert after[name].dtype is torch.float16
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name


@pytest.mark.usefixtures("same_process")
def test_a_gpt2_without_compressed_layers_is_a_dense_copy(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("gpt2")
    model = load(source)
    layers, plan = compress(model)
    assert layers == []
    artifact = write(model, layers, plan, tmp_path / "out", sample=sample_of(model))
    assert artifact.format == "dense"
    assert artifact.manifest["verification"]["max_abs_difference"] == 0.0
    assert "quantization_config" not in json.loads((artifact.path / "config.json").read_text())
    assert artifact.weight_bytes == plan.predicted_bytes
    assert any("Conv1D" in why for why in manifest_of(artifact)["dense"].values())


@pytest.mark.usefixtures("same_process")
def test_other_weights_than_in_memory_are_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The silent failure: everything loads, and the numbers are others."""
    model = load(tiny_model("llama"))
    layers, plan = compress(model)
    sample = sample_of(model)
    layers[3].codes.add_(1).clamp_(max=1)
    with pytest.raises(ArtifactError, match=r"in memory.* [\d.e-]+.*[\d.e-]+ is allowed"):
        write(model, layers, plan, tmp_path / "out", sample=sample)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("same_process")
def test_a_missing_tensor_is_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(tiny_model("llama"))
    layers, plan = compress(model)
    norm = next(spec for spec in model.tensors if spec.name == "model.norm.weight")
    model.tensors = tuple(spec for spec in model.tensors if spec is not norm)
    with pytest.raises(ArtifactError, match=r"1 missing.*model\.norm\.weight"):
        write(model, layers, plan, tmp_path / "out", sample=sample_of(model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_directory_that_does_not_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "bert"}')
    ids = {"input_ids": torch.ones(1, 2, dtype=torch.int64)}
    with pytest.raises(ArtifactError, match=r"stock transformers.*: \w+"):
        reload.reload_in_fresh_process(
            tmp_path / "out", "encoder", reload.ReloadSample(inputs=ids, expected=torch.zeros(1))
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("same_process")
def test_a_config_of_no_known_method_is_found(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers only warns of it, and loads random weights."""
    model = load(tiny_model("bert"))
    layers, plan = compress(model)
    monkeypatch.setattr("cptq.artifact.formats.compressed_tensors.NAME", "nobody-has-this")
    with pytest.raises(ArtifactError, match=r"\d+ missing"):
        write(model, layers, plan, tmp_path / "out", sample=sample_of(model))


def test_an_answer_that_is_no_number_is_no_match() -> None:
    ones = torch.ones(2)
    assert reload._measure_difference(ones * torch.nan, ones) == float("inf")
    assert reload._measure_difference(torch.ones(3), ones) == float("inf")
    assert reload._measure_difference(ones * 3, ones) == 2


def test_without_a_sample_it_is_said_that_nothing_was_verified(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = load(tiny_model("bert"))
    layers, plan = compress(model)
    events: list[Any] = []
    artifact = write(model, layers, plan, tmp_path / "out", events=events)
    assert artifact.manifest["verification"] is None
    assert any(getattr(e, "kind", "") == "warning" and "sample" in e.message for e in events)
