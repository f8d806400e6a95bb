"""Checkpoints to break: copies of tiny ones, and safetensors files written byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from cptq.types import Event


def load(path: Path, events: list[Event] | None = None, **options: Any) -> LoadedModel:
    settings = ModelSettings(model=str(path), device="cpu", **options)
    return load_model(settings, (events if events is not None else []).append)


def copied(source: Path, target: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(source, target))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def pickled(source: Path, target: Path, *, shards: int = 1) -> Path:
    """The same checkpoint with its weights in `shards` pickles and nowhere else."""
    copied(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    where = {
        name: f"pytorch_model-{1 + i % shards:05d}-of-{shards:05d}.bin"
        for i, name in enumerate(tensors)
    }
    for file in sorted(set(where.values())):
        torch.save({n: t for n, t in tensors.items() if where[n] == file}, target / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file; `header` is JSON or the very bytes, `length` what the file claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(raw) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
