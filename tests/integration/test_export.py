"""`cptq export`, `verify` and `inspect` on an artifact that `compress` wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cptq.artifact import hub
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.interface import SafetensorsFormat
from cptq.artifact.inspect import inspect
from cptq.artifact.reader import open_artifact
from cptq.artifact.verify import verify_artifact
from cptq.cli.app import app
from cptq.config import CalibrationSettings, CompressSettings, ExportSettings, ModelSettings
from cptq.errors import ArtifactError, CptqError, OutputExistsError
from cptq.numerics.grid import dequantize_layer
from cptq.pipeline import compress, export
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.usefixtures("same_process")


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory, same_process: None, short_manual: None
) -> Path:
    """A llama in float32, compressed for llama.cpp to a mixed plan."""
    place = tmp_path_factory.mktemp("export")
    model = build_tiny_model(
        place / "model",
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    compress(
        CompressSettings(
            model=ModelSettings(model=str(model), device="cpu"),
            calibration=CalibrationSettings(calibration="pydoc", samples=4, seqlen=32),
            runtime="llamacpp",
            bits=(4, 5, 8, 16),
            group_size=32,
            levels="even",
            embedding_bits=16,
            target="8bit",
            out=place / "artifact",
        ),
        lambda event: None,
    )
    return place / "artifact"


@pytest.fixture
def cptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "80"})
    return lambda *words: runner.invoke(app, [str(word) for word in words])


def exported(artifact: Path, form: str, out: Path, **more: Any) -> Any:
    return export(ExportSettings(artifact=artifact, format=form, out=out, **more), lambda e: None)


@pytest.mark.parametrize("form", list(FORMATS))
def test_an_artifact_becomes_any_format_and_passes_its_verification(
    artifact: Path, tmp_path: Path, form: str
) -> None:
    outcome = exported(artifact, form, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "cptq.json").read_text())
    before = json.loads((artifact / "cptq.json").read_text())
    assert manifest["form"] == form
    assert manifest["plan"] == before["plan"]
    assert manifest["sample"] == before["sample"]
    assert manifest["exported_from"]["format"] == before["format"]
    assert inspect(tmp_path / "out").nbytes == outcome.artifact.weight_bytes
    assert verify_artifact(tmp_path / "out", lambda event: None).tensors == len(
        manifest["tensors_sha256"]
    )


@pytest.mark.parametrize(
    "form", [n for n in FORMATS if isinstance(FORMATS.get(n), SafetensorsFormat)]
)
def test_what_is_read_back_is_what_was_written(artifact: Path, tmp_path: Path, form: str) -> None:
    exported(artifact, form, tmp_path / "out")
    first, second = open_artifact(artifact).content, open_artifact(tmp_path / "out").content
    assert list(first.compressed) == list(second.compressed)
    for name, layer in first.compressed.items():
        assert torch.equal(layer.codes, second.compressed[name].codes)
        assert torch.equal(layer.scale, second.compressed[name].scale)
    assert {s.name for s in first.tensors} == {s.name for s in second.tensors}


def test_the_dense_form_is_the_rounded_weights(artifact: Path, tmp_path: Path) -> None:
    exported(artifact, "dense", tmp_path / "out")
    dense = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in open_artifact(artifact).content.compressed.items():
        assert torch.equal(dense[name], dequantize_layer(layer, torch.float32).to(torch.float16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_exporting_twice_gives_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported(artifact, "gguf", tmp_path / name)
    a, b = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_nothing_is_overwritten_and_nothing_half_written(artifact: Path, tmp_path: Path) -> None:
    exported(artifact, "dense", tmp_path / "out")
    with pytest.raises(OutputExistsError):
        exported(artifact, "dense", tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"cptq\.json"):
        exported(artifact.parent / "model", "dense", tmp_path / "other")
    exported(artifact, "gguf", tmp_path / "gguf")
    with pytest.raises(ArtifactError, match="format gguf"):
        exported(tmp_path / "gguf", "dense", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_answers_than_the_sample_says_are_found(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    manifest = json.loads((copy / "cptq.json").read_text())
    manifest["sample"]["values"][7] += 1.0
    (copy / "cptq.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="answers differently"):
        verify_artifact(copy, lambda event: None)


def test_a_layer_without_inputs_is_a_damaged_manifest(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    manifest = json.loads((copy / "cptq.json").read_text())
    compressed = manifest["layers"][0]["name"]
    next(x for x in manifest["inventory"] if x["name"] == compressed)["shape"] = [64, 0]
    (copy / "cptq.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"is damaged .*has the shape 64 x 0"):
        open_artifact(copy)


def test_the_commands_answer_in_each_shape(
    artifact: Path, tmp_path: Path, cptq: Callable[..., Result]
) -> None:
    done = cptq("export", artifact, "--format", "dense", "--print", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["out"].endswith("artifact-dense")
    assert cptq("verify", artifact, "--format", "quiet").stdout.strip() == str(artifact.resolve())
    found = cptq("inspect", artifact, "--all")
    assert all(len(line) <= 80 for line in found.stdout.splitlines())
    assert "bits, groups of 32" in found.stdout
    assert "packed weights" in found.stdout
    assert "Provenance" in found.stdout
    layers = json.loads(cptq("inspect", artifact, "--format", "json").stdout)["layers"]
    packed = [layer for layer in layers if "bits, groups" in layer["stored"]]
    assert all(4 < layer["bits"] < 9.6 for layer in packed)
    assert cptq("inspect", artifact.parent / "model", "--format", "quiet").exit_code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("export", "ARTIFACT", "--format", "ggu"), "did you mean 'gguf'?"),
        (("export", "nowhere", "--format", "gguf"), "cptq.json"),
        (("verify", "nowhere"), "cptq.json"),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("export", "ARTIFACT", "--format", "gguf", "--push-to-hub", "a b"), "--push-to-hub is"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    artifact: Path, cptq: Callable[..., Result], words: tuple[str, ...], told: str
) -> None:
    done = cptq(*(artifact if word == "ARTIFACT" else word for word in words))
    assert done.exit_code in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path.cwd().iterdir()) == []


class FakeApi:
    """Records what would be sent to the Hub, by huggingface_hub's own names."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **more: Any) -> Any:
        from huggingface_hub import RepoUrl

        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **more}))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **given: Any) -> None:
        self.calls.append(("upload_folder", given))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "error", None)
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return FakeApi


def test_an_export_is_uploaded_without_what_names_this_machine(
    artifact: Path, tmp_path: Path, api: type[FakeApi]
) -> None:
    outcome = exported(artifact, "gguf", tmp_path / "out", push_to_hub="me/tiny", token="t")
    (_, made), (_, sent) = api.calls
    assert made == {"repo_id": "me/tiny", "repo_type": "model", "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/tiny", outcome.artifact.path)
    assert "report.*" in sent["ignore_patterns"]
    assert outcome.repository == "https://huggingface.co/me/tiny"
    assert str(artifact.parent) not in (tmp_path / "out" / "cptq.json").read_text()


def test_a_refused_upload_keeps_what_was_written(
    artifact: Path, tmp_path: Path, api: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "error", OSError("403 Forbidden\nrequest id"))
    with pytest.raises(ArtifactError, match=r"uploaded: 403 Forbidden; .*is kept in .*hf upload"):
        exported(artifact, "dense", tmp_path / "out", push_to_hub="me/tiny", token="t")
    assert (tmp_path / "out" / "cptq.json").exists()


def test_an_upload_that_cannot_work_is_refused_before_the_work(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE is set"):
        exported(artifact, "dense", tmp_path / "out", push_to_hub="me/tiny")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ArtifactError, match="without a token"):
        exported(artifact, "dense", tmp_path / "out", push_to_hub="me/tiny")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", list(FORMATS))
def test_the_card_is_one_that_the_hub_reads(artifact: Path, tmp_path: Path, form: str) -> None:
    from huggingface_hub import ModelCard

    exported(artifact, form, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "cptq" in card.data.tags
    assert card.data.pipeline_tag == "text-generation"
    for words in ("Loading", "Compression", "Results", "Licence"):
        assert f"## {words}" in card.text
    with pytest.raises(CptqError):
        verify_artifact(tmp_path, lambda event: None)
