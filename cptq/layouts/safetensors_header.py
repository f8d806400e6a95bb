"""The header of a safetensors file, byte for byte as the safetensors library writes it.

A file is: 8 bytes, little-endian length n of the header; n bytes of JSON, padded with spaces to a
multiple of 8; the tensors, one after the other without gaps. The library orders tensors by type,
widest first, and then by name, so that each lies aligned. Source: the format's description and
the behaviour of safetensors 0.8, against which every byte is tested.

Pure Python: a byte budget is counted with it where no torch is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, TypeVar

from cptq.types import TensorSpec

#: what transformers writes and asks for
METADATA: Mapping[str, str] = {"format": "pt"}
#: types in the order in which the library lays them out
DTYPE_ORDER = (
    "I64",
    "F64",
    "F32",
    "I32",
    "BF16",
    "F16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
_RANK: Mapping[str, int] = {dtype: rank for rank, dtype in enumerate(DTYPE_ORDER)}
ALIGNMENT = 8
#: bytes of a JSON header without entries
FRAME = len(json.dumps({"__metadata__": dict(METADATA)}, separators=(",", ":")))
#: bytes of tensors in one file; more are split over shards, as transformers does
SHARD_BYTES = 5_000_000_000


def sort_for_file(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors in the order in which they lie in the file."""
    return sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))


def encode_header(specs: Iterable[TensorSpec]) -> bytes:
    """Everything before the first tensor: the length, the JSON, its padding."""
    ordered, entries, start = sort_for_file(specs), [], 0
    for spec in ordered:
        entries.append(_encode_entry(spec, start))
        start += spec.nbytes
    metadata = json.dumps(dict(METADATA), separators=(",", ":"))
    text = "{" + ",".join([f'"__metadata__":{metadata}', *entries]) + "}"
    raw = text.encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _encode_entry(spec: TensorSpec, start: int) -> str:
    name = json.dumps(spec.name, ensure_ascii=False)
    shape = ",".join(map(str, spec.shape))
    offsets = f"{start},{start + spec.nbytes}"
    return f'{name}:{{"dtype":"{spec.dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}'


class Entry(NamedTuple):
    """What counting needs of a tensor, computed once; sorts in file order.

    `fixed` is the length of the header entry with its comma and without the two offsets.
    """

    rank: int
    name: str
    nbytes: int
    fixed: int

    def length(self, start: int) -> int:
        """Bytes of the header entry of a tensor that starts at an offset."""
        return self.fixed + len(str(start)) + len(str(start + self.nbytes))


def measure(spec: TensorSpec) -> Entry:
    """A tensor as an `Entry`."""
    at_zero, nbytes = len(_encode_entry(spec, 0).encode()), spec.nbytes
    fixed = at_zero - len("0") - len(str(nbytes)) + len(",")
    return Entry(rank=_RANK[spec.dtype], name=spec.name, nbytes=nbytes, fixed=fixed)


def count_header_bytes(entries: Iterable[Entry]) -> int:
    """`len(header_bytes(...))` of measured tensors, many times as fast."""
    start, length = 0, FRAME
    for entry in sorted(entries):
        length += entry.length(start)
        start += entry.nbytes
    return 8 + length + -length % ALIGNMENT


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_T = TypeVar("_T", bound=_Sized)


def split_shards(tensors: Iterable[_T], most: int = SHARD_BYTES) -> list[list[_T]]:
    """The tensors by file: in the order given, a new file where `most` bytes would be passed.

    Headers are not counted, as transformers does not. A tensor above `most` has a file of its own.
    """
    shards: list[list[_T]] = [[]]
    held = 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if held and held + nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += nbytes
    return shards


def name_shards(count: int, stem: str = "model") -> list[str]:
    """File names of `count` shards as transformers names them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def sum_bytes(entries: Iterable[Entry], most: int = SHARD_BYTES) -> int:
    """Bytes of the file or of all shards together (not of the JSON index beside shards)."""
    return sum(
        count_header_bytes(shard) + sum(entry.nbytes for entry in shard)
        for shard in split_shards(entries, most)
    )
