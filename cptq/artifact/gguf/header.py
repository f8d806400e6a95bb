"""Read the header of a GGUF file strictly; no value in the file is trusted.

Layout (versions 2 and 3, little-endian): magic, version, number of tensors, number of metadata
entries; the entries (key, type, value); the tensors (name, dimensions, type, offset); the data,
aligned. Every count and length is compared with the remaining bytes before it is used, so a hostile
file cannot make the reader allocate memory. Source: ggml's docs/gguf.md. The gguf package's own
reader trusts its input.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf

from cptq.errors import ArtifactError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
#: minimum bytes of a metadata entry, of a tensor's entry and of a string
_LEAST_ENTRY, _LEAST_TENSOR, _LEAST_STRING = 13, 24, 8
_MOST_DIMENSIONS = 4
#: maximum characters of a reason
_LONGEST = 400
#: longest array that is kept; longer ones (vocabularies) are only counted
KEPT = 64


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: `shape` as in torch (outermost first), `start` from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """`metadata` holds scalars, texts and short arrays; for a long array its length as text."""

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a file.

    Raises:
        ArtifactError: the file is truncated, corrupt, hostile or of another version.
    """
    size = path.stat().st_size
    if size < 24:
        raise _make_error(path, f"it has {size} bytes, fewer than a header")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        try:
            return _Cursor(raw, size).read_header()
        except (ValueError, struct.error) as error:
            raise _make_error(path, str(error)) from error


def _make_error(path: Path, why: str) -> ArtifactError:
    if len(why) > _LONGEST:  # it quotes a name, which corruption can make as long as the file
        why = f"{why[: _LONGEST // 2]} ... {why[-_LONGEST // 2 :]}"
    return ArtifactError(
        f"{path} is not a readable GGUF file: {why}", hint="write or download it again"
    )


class _Cursor:
    """A position in the bytes; its methods raise ValueError for inconsistent content."""

    def __init__(self, raw: mmap.mmap, size: int) -> None:
        self.raw, self.size, self.at = raw, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it ends inside {what}")
        self.at += count
        return self.raw[self.at - count : self.at]

    def read_number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def read_count(self, least: int, what: str) -> int:
        found: int = self.read_number("Q", what)
        if found * least > self.size - self.at:
            raise ValueError(f"it claims {found:,} {what} but is too short for them")
        return found

    def read_text(self, what: str) -> str:
        raw = self.take(self.read_count(1, f"bytes of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 text") from error

    def read_header(self) -> GgufHeader:
        if self.take(4, "its first word") != MAGIC:
            raise ValueError("it does not start with GGUF")
        version = self.read_number("I", "its version")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; 2 and 3 are supported")
        tensors = self.read_count(_LEAST_TENSOR, "tensors")
        metadata = self.read_entries(self.read_count(_LEAST_ENTRY, "metadata entries"))
        infos = [self.read_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & alignment - 1:
            raise ValueError(f"its alignment is {alignment!r}, not a power of two up to 65536")
        start = -(-self.at // alignment) * alignment
        placed = self.place_tensors(infos, start, alignment)
        return GgufHeader(version=version, metadata=metadata, tensors=placed)

    def read_entries(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.read_text("a key of its metadata")
            if key in found:
                raise ValueError(f"its metadata has {key!r} twice")
            found[key] = self.read_value(self.read_number("I", "a type"), key)
        return found

    def read_value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.read_number(_SCALARS[kind], key)
        if kind == _STRING:
            return self.read_text(key)
        if kind != _ARRAY:
            raise ValueError(f"{key!r} has the unknown type {kind}")
        return self.read_array(key)

    def read_array(self, key: str) -> Any:
        inner = self.read_number("I", key)
        if inner in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            count = self.read_count(width, f"values of {key!r}")
            raw = self.take(count * width, key)
            unpack = f"<{count}{_SCALARS[inner]}"
            kept: list[Any] | None = list(struct.unpack(unpack, raw)) if count <= KEPT else None
        elif inner == _STRING:
            count = self.read_count(_LEAST_STRING, f"values of {key!r}")
            kept = self.read_texts(count, key)
        else:
            raise ValueError(f"{key!r} is an array of type {inner}")
        return kept if kept is not None else f"{count:,} values"

    def read_texts(self, count: int, key: str) -> list[str] | None:
        if count <= KEPT:
            return [self.read_text(key) for _ in range(count)]
        for _ in range(count):
            length = self.read_count(1, f"bytes of {key}")
            self.at += length
        return None

    def read_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.read_text("the name of a tensor")
        dimensions = self.read_number("I", name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.read_number("Q", name) for _ in range(dimensions))
        return name, shape, self.read_number("I", name), self.read_number("Q", name)

    def place_tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        """Return the tensors in file order; each must start where the previous one ends."""
        found: dict[str, GgufTensor] = {}
        expected = 0
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            tensor = _parse_tensor(name, shape, kind, start + offset)
            if name in found:
                raise ValueError(f"it holds {name!r} twice")
            if offset != expected or tensor.start + tensor.nbytes > self.size:
                raise ValueError(f"the offset of {name!r} does not match its shape")
            found[name] = tensor
            expected = -(-(offset + tensor.nbytes) // alignment) * alignment
        return tuple(found.values())


def _parse_tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise ValueError(f"{name!r} has the unknown type {kind}") from error
    block, width = gguf.GGML_QUANT_SIZES[known]
    if min(shape) < 1 or shape[0] % block:
        raise ValueError(
            f"{name!r} has the shape {shape}, which is not in whole blocks of {known.name}"
        )
    nbytes = prod(shape) // block * width
    return GgufTensor(name=name, kind=known.name, shape=shape[::-1], start=start, nbytes=nbytes)
