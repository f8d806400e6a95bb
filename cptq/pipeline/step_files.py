"""Values as files that are whole or recognised as damaged: one safetensors file per step.

    000-run.<sha256>.safetensors, 001-sensitivity.<sha256>.safetensors, ...

Tensors are tensors of the file; everything else is JSON in its metadata, in which every object has
one key, the type of the value: so tuples, keys that are no texts and the dataclasses of
`cptq.types` come back as what they were. Numbers come back to the bit. The digest of the file's
bytes is part of its name: a file that was cut off or changed is not what its name says.

A file is written under another name, synced and renamed, and then the directory is synced. What is
read back is mapped from the file, so that tensors take no memory until they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cptq.artifact.atomic import sync_directory
from cptq.types import (
    ActivationRule,
    Budget,
    Candidate,
    CompressedLayer,
    GuardMeasure,
    GuardQuality,
    LayerResult,
    LayerSpec,
    Notice,
    Plan,
    SensitivityTable,
)

_KINDS = (
    *(ActivationRule, Budget, Candidate, CompressedLayer, LayerResult, LayerSpec),
    *(GuardMeasure, GuardQuality, Notice, Plan, SensitivityTable),
)
_CLASSES: Mapping[str, Any] = {kind.__name__: kind for kind in _KINDS}
_NAME = re.compile(r"(?P<number>\d{3,})-(?P<step>.+)\.(?P<sha256>[0-9a-f]{64})\.safetensors")
_CONTENT = "content"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFile:
    """A file by its name: its place in the order of steps, the step, and the digest."""

    path: Path
    number: int
    step: str
    sha256: str

    @property
    def intact(self) -> bool:
        """Whether the file holds what was written; reads it whole."""
        try:
            return _hash_file(self.path) == self.sha256
        except OSError:
            return False


def list_step_files(folder: Path) -> list[StepFile]:
    """Return the steps in a folder, in their order, by their names alone."""
    found = []
    for path in folder.glob("*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            number = int(match["number"])
            found.append(
                StepFile(path=path, number=number, step=match["step"], sha256=match["sha256"])
            )
    return sorted(found, key=lambda file: (file.number, file.path.name))


def write_step(folder: Path, number: int, step: str, value: Any) -> StepFile:
    """Write a value as the step of this number and name.

    Raises:
        OSError: the disk is full, or another system error; no file of the step is left.
        TypeError: the value holds what no step can hold.
    """
    plain, tensors = pack(value)
    partial = folder / f"{number:03d}-{step}.partial"
    try:
        _save_tensors(tensors, partial, json.dumps(plain))
        digest = _hash_file(partial, sync=True)
        path = folder / f"{number:03d}-{step}.{digest}.safetensors"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(folder)
    return StepFile(path=path, number=number, step=step, sha256=digest)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, content: str) -> None:
    try:
        save_file(tensors, path, metadata={_CONTENT: content})
    except SafetensorError as error:  # which tells system errors as text
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def read_step(file: StepFile) -> Any:
    """Return the value in a file that is intact; its tensors are mapped from the file."""
    with safe_open(str(file.path), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return unpack(json.loads(opened.metadata()[_CONTENT]), tensors)


def _hash_file(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pack(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a value as JSON types, and its tensors by the names that stand for them there."""
    tensors: dict[str, torch.Tensor] = {}
    return _pack(value, tensors), tensors


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # a copy: the library refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        return {"map": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, float):  # NumPy's, whose bits are those of Python's
        return float(value)
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        return {type(value).__name__: _pack_fields(value, tensors)}
    raise TypeError(f"a step cannot hold {type(value).__name__}")


def _pack_fields(value: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the fields by name, without those of plain types that have their default."""
    found = {}
    for item in fields(value):
        own = getattr(value, item.name)
        usual = item.default is not MISSING and type(own) is type(item.default)
        if not (usual and own == item.default):
            found[item.name] = _pack(own, tensors)
    return found


def unpack(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that `pack` was given."""
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    if kind == "map":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    return _CLASSES[kind](**{name: unpack(item, tensors) for name, item in content.items()})
