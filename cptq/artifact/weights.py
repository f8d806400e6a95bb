"""Write weights to safetensors files, one tensor in memory at a time, and hash them.

The bytes are those that the safetensors library would write (tested), but each tensor is fetched,
written and released, every file is synced to disk, and a full disk raises a proper `OSError`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cptq.artifact.atomic import write_bytes
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ArtifactError
from cptq.layouts.safetensors_header import (
    SHARD_BYTES,
    header_bytes,
    in_file_order,
    shard_names,
    split_shards,
)
from cptq.types import TensorSpec

_CHUNK = 1 << 22

Fetch = Callable[[TensorSpec], Tensor]
"""Returns the value of a tensor in its storage type, on any device."""


def write_weights(
    directory: Path,
    specs: Sequence[TensorSpec],
    fetch: Fetch,
    *,
    most: int = SHARD_BYTES,
    stem: str = "model",
) -> dict[str, int]:
    """Write `model.safetensors`, or shards and their index.

    Args:
        directory: the output directory.
        specs: all tensors, in the order in which shards are filled.
        fetch: returns each value.
        most: maximum bytes of tensors per file.
        stem: name of the files in place of "model".

    Returns:
        {file name: bytes} of the weight files.

    Raises:
        ArtifactError: a value does not match its spec.
        OSError: the disk is full, or another system error.
    """
    shards = split_shards(specs, most)
    names = shard_names(len(shards), stem)
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, fetch)
    if len(shards) > 1:
        weight_map = {s.name: n for n, shard in zip(names, shards, strict=True) for s in shard}
        total = {"total_size": sum(spec.nbytes for spec in specs)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        write_bytes(
            directory / f"{stem}.safetensors.index.json",
            (json.dumps(index, indent=2) + "\n").encode(),
        )
    return {name: (directory / name).stat().st_size for name in names}


def _write_file(path: Path, specs: Iterable[TensorSpec], fetch: Fetch) -> None:
    ordered = in_file_order(specs)
    with path.open("wb") as stream:
        stream.write(header_bytes(ordered))
        for spec in ordered:
            stream.write(_get_bytes(spec, fetch(spec)))
        stream.flush()
        os.fsync(stream.fileno())


def _get_bytes(spec: TensorSpec, tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor after checking it against its spec."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype is not TORCH_DTYPES[spec.dtype]:
        raise ArtifactError(
            f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)} in memory but "
            f"{spec.dtype} {spec.shape} in the checkpoint"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw


def compute_tensor_digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 (hex) of the stored bytes of every tensor, sorted by name."""
    digests: dict[str, str] = {}
    for path in paths:
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            header.pop("__metadata__", None)
            for name in sorted(header, key=lambda n: header[n]["data_offsets"]):
                start, end = header[name]["data_offsets"]
                digests[name] = _hash_bytes(stream.read, end - start)
    return dict(sorted(digests.items()))


def _hash_bytes(read: Callable[[int], bytes], left: int) -> str:
    digest = hashlib.sha256()
    while left:
        chunk = read(min(left, _CHUNK))
        if not chunk:
            raise ArtifactError("a weight file is truncated")
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
