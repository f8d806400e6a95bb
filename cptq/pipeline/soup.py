"""`cptq soup`: the average of several dense or masked checkpoints of one architecture.

    W = mean over models of W_m,      0 where all of them are 0

Source: Sparse Model Soups (Zimmer et al., arXiv 2306.16788), which averages models retrained from
one pruned parent, so that they share a mask, and model soups (Wortsman et al., arXiv 2203.05482).
A matrix with at least `MASKED` zeros in some model counts as masked, and must have its zeros at the
same places in all: the average then keeps the mask. Fewer zeros are chance.

Sums run in float64 in the order of the models; the result has the type of the first. Cost: all
files are read once, one tensor of each model in memory. Limits: no training, so the models have to
come from somewhere; averages of models from different parents are worthless, which only an
evaluation shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cptq.artifact.atomic import check_output, create_directory, write_files
from cptq.checkpoint.files import find_weight_files, open_tensors, read_config, read_header
from cptq.config import SoupSettings
from cptq.errors import ModelError
from cptq.types import Emit, Progress, TensorSpec

#: share of zeros from which a matrix counts as masked
MASKED = 0.05
#: what an older output is recognised by; says what was averaged
MARKER = "soup.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoupOutcome:
    """What was written: averaged tensors, those of them that are masked, and the share of zeros."""

    out: Path
    models: int
    tensors: int
    masked: int
    zeros: float
    weight_bytes: int


class _Source:
    """The tensors of a checkpoint by name, mapped from its files."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        if "quantization_config" in read_config(path):
            raise ModelError(
                f"{path} is compressed, and packed weights cannot be averaged",
                allowed="dense checkpoints, with or without zeros",
                hint=f"type cptq export {path} --format dense",
            )
        self.files = find_weight_files(path)
        self.specs: dict[str, TensorSpec] = {}
        self._handles: dict[str, Any] = {}
        for file in self.files:
            handle = stack.enter_context(open_tensors(file, "pt"))
            header = read_header(file)
            self.specs |= header
            self._handles |= dict.fromkeys(header, handle)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        found: Tensor = self._handles[name].get_tensor(name)
        return found


def soup(settings: SoupSettings, emit: Emit) -> SoupOutcome:
    """Average the models and write the result as a checkpoint like the first.

    Raises:
        ModelError: a model is compressed, or differs from the first in a tensor, which is named.
    """
    paths = [Path(source).expanduser() for source in settings.sources]
    out = settings.out or Path(f"{paths[0].resolve().name}-soup")
    place = check_output(out, overwrite=settings.overwrite, source=paths[0], marker=MARKER)
    with ExitStack() as stack:
        sources = [_Source(path, stack) for path in paths]
        for other in sources[1:]:
            _check_same_tensors(sources[0], other)
        return _write(sources, place, out, emit)


def _check_same_tensors(first: _Source, other: _Source) -> None:
    for name in [*first.specs, *other.specs]:
        own, its = first.specs.get(name), other.specs.get(name)
        if own is None or its is None or own.shape != its.shape:
            described = [_describe(s.path, spec) for s, spec in ((first, own), (other, its))]
            raise ModelError(
                f"{name} differs: {', '.join(described)}", allowed="models of one architecture"
            )


def _describe(path: Path, spec: TensorSpec | None) -> str:
    return f"{path} has " + ("none" if spec is None else f"{list(spec.shape)}")


def _write(sources: Sequence[_Source], place: Path, out: Path, emit: Emit) -> SoupOutcome:
    first = sources[0]
    need = sum(file.stat().st_size for file in first.files)
    done = masked = zeros = weights = 0
    with create_directory(place, need) as folder:
        _copy_companions(first, folder)
        for file in first.files:
            made: dict[str, Tensor] = {}
            for name in read_header(file):
                emit(Progress(stage="soup", done=done, total=len(first.specs), message=name))
                made[name], has_mask = average(name, {str(s.path): s.read(name) for s in sources})
                done, masked = done + 1, masked + has_mask
                zeros += int((made[name] == 0).sum())
                weights += made[name].numel()
            save_file(made, folder / file.name, metadata={"format": "pt"})
        record = {"models": [s.path.name for s in sources], "tensors": done, "masked": masked}
        write_files(folder, {MARKER: (json.dumps(record, indent=1) + "\n").encode()})
    emit(Progress(stage="soup", done=done, total=done))
    return SoupOutcome(
        out=out,
        models=len(sources),
        tensors=done,
        masked=masked,
        zeros=zeros / max(weights, 1),
        weight_bytes=sum((place / file.name).stat().st_size for file in first.files),
    )


def _copy_companions(first: _Source, folder: Path) -> None:
    """Copy what is no weights: config, tokenizer, the index of shards."""
    taken = {file.name for file in first.files}
    for path in sorted(first.path.iterdir()):
        other = path.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if path.is_file() and path.name not in taken and not other:
            shutil.copyfile(path, folder / path.name)


def average(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """Return the mean of one tensor of all models {path: tensor}, and whether it is masked.

    Raises:
        ModelError: zeros of a masked matrix lie at other places, or whole numbers differ.
    """
    (path, first), *others = parts.items()
    if not first.is_floating_point():
        for other_path, other in others:
            if not torch.equal(first, other):
                raise ModelError(f"{name} differs between {path} and {other_path}, and is no float")
        return first, False
    masks = {at: part == 0 for at, part in parts.items()}
    is_masked = first.dim() > 1 and any(m.float().mean() >= MASKED for m in masks.values())
    if is_masked:
        _check_mask(name, masks)
    total = first.double()
    for _, other in others:
        total = total + other.double()
    return (total / len(parts)).to(first.dtype), is_masked


def _check_mask(name: str, masks: Mapping[str, Tensor]) -> None:
    (path, first), *others = masks.items()
    for other_path, other in others:
        if not torch.equal(first, other):
            raise ModelError(
                f"{name} has its zeros at other places in {other_path} ({int(other.sum()):,}) than "
                f"in {path} ({int(first.sum()):,})",
                allowed="models of one mask, such as several retrained from one pruned parent",
                hint="an average of different masks has the zeros that all share, and few others",
            )
