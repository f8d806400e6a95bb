"""A compress that holds one block at a time writes the files of one that holds the model."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.artifact.formats import compressed_tensors
from cptq.checkpoint import memory
from cptq.checkpoint.memory import BASE, Memory
from cptq.errors import ArtifactError, UsageError
from cptq.types import Notice
from tests.conftest import Heard, TinyModel
from tests.tiny_models import SENTENCES
from tests.unit.checkpoint.made import edit_weights

pytestmark = pytest.mark.usefixtures("short_manual")
#: what differs from run to run, seconds and dates, stands in these alone
REPORTS = {"report.json", "report.md", "report.html"}


def narrowed(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target.parent / "text.txt").write_text("\n".join(SENTENCES * 60))
    return edit_weights(
        target, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()})
    )


def sha256_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in REPORTS]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def compress(path: Path, out: Path, **options: Any) -> Any:
    return cptq.compress(
        str(path),
        out=out,
        calibration=str(path.parent / "text.txt"),
        samples=8,
        seqlen=64,
        batch_size=2,
        group_size=16,
        **options,
    )


def starve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have no memory beyond what the libraries take."""
    monkeypatch.setattr(memory, "measure_free_bytes", lambda: int(BASE / memory.FREE_SHARE))


@pytest.mark.parametrize(
    ("arch", "runtime"),
    [
        ("llama", "transformers"),
        pytest.param("bert", "cptq", marks=pytest.mark.slow),
        pytest.param("llama", "cptq", marks=pytest.mark.slow),
        pytest.param("opt", "transformers", marks=pytest.mark.slow),
        pytest.param("opt", "cptq", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("same_process")
def test_the_artifact_is_the_same(
    arch: str,
    runtime: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heard: Heard,
) -> None:
    path = narrowed(tiny_model(arch), tmp_path / "model")
    options: dict[str, Any] = {"runtime": runtime, "target": "3.5bit", "progress": heard.append}
    compress(path, tmp_path / "whole", **options)
    wanted = sha256_of(tmp_path / "whole")
    assert len(wanted) > 4
    heard.clear()
    starve(monkeypatch)
    compress(path, tmp_path / "small", **options)
    assert sha256_of(tmp_path / "small") == wanted
    short = [x for x in heard if isinstance(x, Notice) and "first 1 of 2 blocks" in x.message]
    assert len(short) == (runtime == "transformers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "small", "text.txt", "whole"]


@pytest.mark.slow
def test_a_wrong_block_is_found_by_the_short_check(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = narrowed(tiny_model("llama"), tmp_path / "model")
    starve(monkeypatch)
    pack = compressed_tensors.pack_rows

    def broken(codes: torch.Tensor, bits: int) -> torch.Tensor:
        return pack(codes.roll(1, 0), bits)

    monkeypatch.setattr(compressed_tensors, "pack_rows", broken)
    with pytest.raises(ArtifactError, match="answers differently"):
        compress(path, tmp_path / "out", target="3.5bit", overwrite=True)
    assert not (tmp_path / "out").exists()


def test_a_limit_that_holds_no_block_is_refused_before_the_work(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = narrowed(tiny_model("llama"), tmp_path / "model")
    with pytest.raises(UsageError, match="does not hold one block"):
        compress(path, tmp_path / "out", max_memory="100MB")
    with pytest.raises(UsageError, match="--max-memory is 'much'"):
        compress(path, tmp_path / "out", max_memory="much")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]
    assert Memory(total=BASE).weights == 0
