"""Check the files of a checkpoint before anything is allocated.

Only the headers are read: a shard must exist, lie inside the directory and be as long as its header
says, and its tensors must not overlap. Format: 8 bytes little-endian header length, a JSON
header, the data (safetensors' own description). Pickles are never opened here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cptq.errors import ModelError
from cptq.layouts.packed import WEIGHT_FILES
from cptq.types import DTYPE_BYTES, TensorSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: the same for a packed artifact
PACKED_SINGLE, PACKED_INDEX = WEIGHT_FILES
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
#: what reading an arbitrary header can raise
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
#: safetensors' own limit on the header
MOST_HEADER = 100_000_000


def find_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in index order; empty if there are none.

    Raises:
        ModelError: the index is unreadable, or names a missing file or one outside `directory`.
    """
    found = _find_files(directory, SINGLE, INDEX)
    return found or _find_files(directory, PACKED_SINGLE, PACKED_INDEX)


def find_pickle_files(directory: Path) -> list[Path]:
    """Return the pickled weight files of a checkpoint; raise as `find_weight_files`."""
    return _find_files(directory, PICKLE_SINGLE, PICKLE_INDEX)


def _find_files(directory: Path, single: str, index: str) -> list[Path]:
    # transformers, too, takes the single file if both exist
    if (directory / single).is_file():
        return [directory / single]
    if not (directory / index).exists():
        return []
    names = dict.fromkeys(_read_weight_map(directory / index).values())
    return [_find_shard(directory / index, name) for name in names]


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ModelError(
            f"{index} is not an index of shards ({type(error).__name__})",
            hint="download the checkpoint again",
        ) from error
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} has a weight_map that is not a table of file names")
    return weight_map


def _find_shard(index: Path, name: str) -> Path:
    directory, path = index.parent, index.parent / name
    # a Hub snapshot links its files into a blob store: judge the name, not what it links to
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(
            f"{index} names the shard {name!r}, which lies outside {directory}",
            allowed="file names inside the checkpoint directory",
        )
    if not path.is_file():
        raise ModelError(
            f"{index} names the shard {name!r}, which is missing",
            hint="download the checkpoint again; all shards are needed",
        )
    return path


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of one safetensors file, in file order.

    Raises:
        ModelError: the file is truncated, corrupt or hostile.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MOST_HEADER, size - 8):
            raise _build_corrupt_error(
                path, f"its header claims {length:,} bytes and the file has {size:,}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        if not all(isinstance(v, str) for v in header.pop("__metadata__", {}).values()):
            raise ValueError("metadata that is not text")
        entries = dict(header)
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return _check_entries(path, ordered, size - 8 - length)
    except UNREADABLE as error:
        raise _build_corrupt_error(
            path, f"its header cannot be read ({type(error).__name__})"
        ) from error


def open_tensors(path: Path, framework: str) -> Any:
    """Return the safetensors library's handle on a file, a context that maps it without reading.

    Raises:
        ModelError: the library refuses it.
    """
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise _build_corrupt_error(path, str(error)[:200]) from error


def _check_entries(
    path: Path, entries: list[tuple[str, Any]], data_bytes: int
) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    end_before = 0
    for name, entry in entries:
        start, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if not all(type(n) is int for n in (start, end, *shape)):
            raise _build_corrupt_error(path, f"{name!r} has invalid offsets")
        if dtype not in DTYPE_BYTES:
            raise ModelError(f"{path} holds {name!r} as {dtype}, which cptq does not know")
        spec = TensorSpec(name=name, dtype=dtype, shape=shape)
        if min(shape, default=0) < 0 or start != end_before or end - start != spec.nbytes:
            raise _build_corrupt_error(path, f"the offsets of {name!r} do not match its shape")
        specs[name], end_before = spec, end
    if end_before != data_bytes:
        raise _build_corrupt_error(
            path, f"{end_before:,} bytes of weights expected, {data_bytes:,} found"
        )
    return specs


def _build_corrupt_error(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} is corrupt or truncated: {why}", hint="download or copy the file again"
    )


def read_tensor_specs(directory: Path) -> dict[str, TensorSpec]:
    """Return all tensors by name; raise as `find_weight_files` and `read_header`."""
    specs: dict[str, TensorSpec] = {}
    for path in find_weight_files(directory):
        specs |= read_header(path)
    return specs


def compute_fingerprint(paths: list[Path]) -> str:
    """Return the sha256 of the weight files' contents, in order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def read_config(directory: Path) -> Mapping[str, Any]:
    """Return config.json as plain data.

    Raises:
        ModelError: it is missing, or not a JSON object.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ModelError(
            f"{directory} has no config.json, so it is not a Hugging Face checkpoint",
            allowed="a directory written by save_pretrained, or a Hub id such as facebook/opt-125m",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


#: settings that are a dimension of some tensor, under the names that families give them
_DIMENSIONS = ("hidden_size", "intermediate_size", "vocab_size", "n_embd", "dim", "hidden_dim")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_sizes(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> None:
    """Refuse settings that the weights cannot match, before a model of that size is built.

    Raises:
        ModelError: a dimension larger than all stored numbers, or more blocks than tensors.
    """
    most = max((spec.numel for spec in tensors.values()), default=0)
    limits = dict.fromkeys(_DIMENSIONS, most) | dict.fromkeys(_COUNTS, len(tensors))
    for name, limit in limits.items():
        value = config.get(name)
        if isinstance(value, int) and value > limit:
            raise ModelError(
                f"{directory / 'config.json'} says {name} {value:,}, more than the weights hold",
                hint="download or copy the checkpoint again",
            )
