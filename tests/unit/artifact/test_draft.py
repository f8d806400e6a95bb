from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cptq.artifact import atomic
from cptq.artifact import draft as drafts
from cptq.artifact.atomic import check_output, check_space
from cptq.artifact.content import build_content
from cptq.artifact.draft import Draft, Record, draft
from cptq.artifact.formats.compressed_tensors import build_quantization_config
from cptq.artifact.weights import write_weights
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ArtifactError, OutputExistsError
from cptq.types import CompressedLayer, Event, Notice, Plan, TensorSpec
from tests.conftest import TinyModel
from tests.unit.artifact.builders import RECORD, compress, load, write

Made = tuple[LoadedModel, list[CompressedLayer], Plan]


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def test_same_input_same_bytes(made: Made, tmp_path: Path) -> None:
    write(*made, tmp_path / "a")
    write(*made, tmp_path / "b")
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_the_manifest_describes_the_files(made: Made, tmp_path: Path) -> None:
    model, layers, plan = made
    artifact = write(model, layers, plan, tmp_path / "out")
    found = json.loads((artifact.path / "cptq.json").read_text())
    assert Plan.from_dict(found["plan"]) == plan
    assert found["model"]["fingerprint"] == model.fingerprint
    assert found["calibration"]["fingerprint"] == "a" * 64
    assert {"cptq", "torch", "transformers", "safetensors"} <= set(found["versions"])
    assert [layer["name"] for layer in found["layers"]] == [x.spec.name for x in layers]
    assert {spec.name for spec in model.layers} == {
        *found["dense"],
        *(layer["name"] for layer in found["layers"]),
    }
    tensors = load_file(artifact.path / "model.safetensors")
    assert set(tensors) == set(found["tensors_sha256"])
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert found["tensors_sha256"][name] == hashlib.sha256(raw).hexdigest()
    assert found["weight_files"] == {"model.safetensors": artifact.weight_bytes}


def test_quantization_config_names_every_linear_once(made: Made) -> None:
    model, layers, _ = made
    config = build_quantization_config(layers, model.layers)
    assert config is not None
    groups = config["config_groups"]
    targets = [name for group in groups.values() for name in group["targets"]]
    assert sorted(targets) == sorted(layer.spec.name for layer in layers)
    linears = {spec.name for spec in model.layers if spec.kind in ("linear", "head")}
    assert set(config["ignore"]) == linears - set(targets)
    assert "lm_head" in config["ignore"]
    assert config["kv_cache_scheme"] is None
    schemes = [json.dumps(group["weights"], sort_keys=True) for group in groups.values()]
    assert len(set(schemes)) == len(schemes)


def test_companions_come_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model("bert-encoder"), source)
    more = {
        "LICENSE": "Apache",
        "NOTICE.txt": "notice",
        "chat_template.jinja": "{{ x }}",
        "README.md": "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n",
        "generation_config.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "optimizer.pt": "not wanted",
        "modules.json": json.dumps(
            [
                {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        ),
    }
    for name, text in more.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "LICENSE").rename(tmp_path / "blob")
    (source / "LICENSE").symlink_to(tmp_path / "blob")  # as in a snapshot of the Hub
    model = load(source)
    artifact = write(model, *compress(model), tmp_path / "out", extras={"a/b.json": b"{}"})
    written = files_below(artifact.path)
    for name in set(more) - {"README.md", "optimizer.pt"}:
        assert written[name].decode() == more[name]
    assert not (artifact.path / "LICENSE").is_symlink()
    assert {"tokenizer.json", "tokenizer_config.json", "a/b.json"} <= set(written)
    assert "optimizer.pt" not in written
    card = written["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "AutoModel.from_pretrained" in card
    assert "SentenceTransformer" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc"])
def test_modules_outside_the_model_are_refused(
    tiny_model: TinyModel, tmp_path: Path, folder: str
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model("bert-encoder"), source)
    (source / "modules.json").write_text(json.dumps([{"path": folder, "type": "x.Pooling"}]))
    model = load(source)
    with pytest.raises(ArtifactError, match=f"'{folder}'"):
        write(model, *compress(model), tmp_path / "out")


def test_a_tokenizer_without_files_is_saved(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model("bert"), source)
    model = load(source)
    for path in source.glob("tokenizer*"):
        path.unlink()
    events: list[Any] = []
    artifact = write(model, *compress(model), tmp_path / "out", events=events)
    assert (artifact.path / "tokenizer.json").exists()
    notices = [event for event in events if isinstance(event, Notice)]
    assert any(n.kind == "fallback" and "tokenizer" in n.message for n in notices)
    assert any(n.kind == "info" and "licence" in n.message for n in notices)


def test_an_existing_output_is_kept(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputExistsError, match=r"out .*--overwrite") as error:
        write(*made, out)
    assert error.value.exit_code == 2
    assert list(out.iterdir()) == []


def test_overwrite_replaces_an_artifact_whole(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(*made, out, extras={"old.json": b"{}"})
    write(*made, out, overwrite=True)
    assert not (out / "old.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_replace_what_is_not_ours(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"out .*cptq\.json"):
        write(*made, out, overwrite=True)
    file = tmp_path / "file"
    file.write_text("a file")
    with pytest.raises(ArtifactError, match=r"file .*cptq\.json"):
        write(*made, file, overwrite=True)


def test_the_model_itself_is_never_replaced(tmp_path: Path) -> None:
    source = tmp_path / "models" / "a"
    source.mkdir(parents=True)
    (source / "cptq.json").touch()
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, source.parent, link):
        with pytest.raises(ArtifactError, match=f"^{re.escape(str(out.resolve()))} "):
            check_output(out, overwrite=True, source=source)


def fail_after(count: int, error: BaseException) -> Any:
    calls = iter(range(10**6))

    def write_or_fail(path: Path, content: bytes) -> None:
        if next(calls) >= count:
            raise error
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write_or_fail


@contextmanager
def drafted(made: Made, out: Path, *, overwrite: bool = False) -> Iterator[Draft]:
    """A draft of `out` whose weights are written."""
    model, layers, plan = made
    content = build_content(model, layers, quiet)
    with draft(out, overwrite=overwrite, source=model.path, emit=quiet) as d:
        d.write(content, Record(plan=plan, calibration=RECORD, seed=0), {"plan.json": b"{}"})
        yield d


def quiet(_event: Event) -> None: ...


def needed_bytes(error: ArtifactError) -> int:
    """The bytes that the message of a full disk names."""
    return int(error.problem.split(" needs ")[1].split(" ")[0].replace(",", ""))


@pytest.mark.parametrize("step", ["written", "verified", "added"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_inside_leaves_nothing_of_the_draft(
    made: Made, tmp_path: Path, step: str, error: type[BaseException], overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        write(*made, out, extras={"old.json": b"{}"})
    before = files_below(tmp_path)

    def fail_at_step() -> None:
        with drafted(made, out, overwrite=overwrite) as d:
            if step != "written":
                d.verify(None)
            if step == "added":
                d.add({"report.json": b"{}"})
            assert {p.name for p in tmp_path.iterdir()} - {"out"} == {d.folder.name}
            raise error

    with pytest.raises(error):
        fail_at_step()
    assert files_below(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_an_older_artifact_stays_until_the_draft_is_complete(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(*made, out, extras={"old.json": b"{}"})
    before = files_below(out)
    with drafted(made, out, overwrite=True) as d:
        d.verify(None)
        d.add({"report.json": b"{}"})
        assert files_below(out) == before
    assert {"plan.json", "report.json"} <= set(files_below(out))
    assert not (out / "old.json").exists()


def test_files_are_added_after_the_manifest_which_does_not_cover_them(
    made: Made, tmp_path: Path
) -> None:
    with drafted(made, tmp_path / "out") as d:
        assert d.verify(None) is None
        d.add({"report.json": b"[1]", "more/x.json": b"[2]"})
    assert (d.artifact.path / "report.json").read_bytes() == b"[1]"
    assert (d.artifact.path / "more" / "x.json").read_bytes() == b"[2]"
    assert "plan.json" in d.artifact.manifest["files_sha256"]
    assert not {"report.json", "more/x.json"} & set(d.artifact.manifest["files_sha256"])
    stored = json.loads((d.artifact.path / "cptq.json").read_text())
    assert stored == json.loads(json.dumps(d.artifact.manifest))


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "model.safetensors"])
def test_files_that_are_added_stay_inside(made: Made, tmp_path: Path, name: str) -> None:
    with drafted(made, tmp_path / "out") as d:
        d.verify(None)
        with pytest.raises(ArtifactError, match=re.escape(repr(name))):
            d.add({name: b""})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_draft_that_was_not_verified_is_not_put_in_place(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="verified"), drafted(made, tmp_path / "out"):
        pass
    with (
        pytest.raises(RuntimeError, match="written"),
        draft(tmp_path / "out", overwrite=False, source=made[0].path, emit=quiet) as d,
    ):
        d.verify(None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_reports_are_added(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    artifact = write(*made, out)
    before = files_below(out)
    error = OSError(errno.ENOSPC, "No space left on device")

    def fill_disk() -> None:
        with drafted(made, out, overwrite=True) as d:
            d.verify(None)
            monkeypatch.setattr(drafts, "write_files", fail_after(0, error))
            d.add({"report.json": bytes(5_000)})

    with pytest.raises(ArtifactError, match="the disk is full") as caught:
        fill_disk()
    assert needed_bytes(caught.value) > 2**20 + artifact.weight_bytes + 5_000
    assert caught.value.__cause__ is error
    assert files_below(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ArtifactError,
            r"[\d,]+ bytes.*[\d,]+",
        ),
        (
            OSError(errno.EACCES, "Permission denied"),
            ArtifactError,
            "Permission denied",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_nothing_half_written_stays(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
    error: BaseException,
    raised: type[BaseException],
    words: str,
) -> None:
    out = tmp_path / "sub" / "out"
    before = {}
    if overwrite:
        write(*made, out)
        before = files_below(out)
    monkeypatch.setattr(drafts, "write_bytes", fail_after(1, error))
    with pytest.raises(raised, match=words):
        write(*made, out, overwrite=overwrite, extras={"x.json": b"{}"})
    assert [p.name for p in out.parent.iterdir()] == (["out"] if overwrite else [])
    assert (files_below(out) if overwrite else {}) == before


def test_the_old_one_comes_back_when_the_rename_fails(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(*made, out)
    before = files_below(out)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        write(*made, out, overwrite=True)
    assert files_below(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=12_345)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ArtifactError, match=r"[\d,]+ bytes.*\b12,345\b") as caught:
        write(*made, tmp_path / "out")
    assert needed_bytes(caught.value) >= 2**20 + made[2].predicted_bytes
    assert list(tmp_path.iterdir()) == []


def test_check_space() -> None:
    check_space(Path("."), 1)
    with pytest.raises(ArtifactError, match="the disk is full"):
        check_space(Path("."), 10**18)


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path) -> None:
    specs = [TensorSpec(name=f"t{i}", dtype="F16", shape=(10, i)) for i in range(1, 6)]
    values = {spec.name: torch.randn(spec.shape).half() for spec in specs}
    files = write_weights(tmp_path, specs, lambda spec: values[spec.name], most=100)
    assert list(files) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 300
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], values[name])
        assert (tmp_path / file).stat().st_size == files[file]
