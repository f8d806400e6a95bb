from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.layouts.safetensors_header import (
    DTYPE_ORDER,
    count_header_bytes,
    encode_header,
    measure,
    name_shards,
    split_shards,
    sum_bytes,
)
from cptq.types import DTYPE_BYTES, TensorSpec

METADATA = {"format": "pt"}


def library_file(specs: list[TensorSpec]) -> bytes:
    tensors = {spec.name: torch.zeros(spec.shape).to(TORCH_DTYPES[spec.dtype]) for spec in specs}
    return save(tensors, METADATA)


def test_every_type_that_cptq_knows_has_its_place() -> None:
    assert sorted(DTYPE_ORDER) == sorted(DTYPE_BYTES)


def test_equals_the_library_for_all_types_and_odd_shapes() -> None:
    specs = [
        TensorSpec(name=f"{'zyx'[i % 3]}.{dtype}{len(shape)}{sum(shape)}", dtype=dtype, shape=shape)
        for i, dtype in enumerate(DTYPE_BYTES)
        for shape in ((), (3,), (0, 2), (5, 7))
    ]
    written = library_file(specs)
    header = encode_header(specs)
    assert written[: len(header)] == header
    assert len(written) == sum_bytes(map(measure, specs))


names = st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__")


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        names.filter(lambda n: n.isprintable()),
        st.tuples(st.sampled_from(DTYPE_ORDER), st.lists(st.integers(0, 9), max_size=3)),
        max_size=12,
    )
)
def test_equals_the_library(table: dict[str, tuple[str, list[int]]]) -> None:
    specs = [TensorSpec(name=n, dtype=d, shape=tuple(s)) for n, (d, s) in table.items()]
    written = library_file(specs)
    assert written[: len(encode_header(specs))] == encode_header(specs)
    assert count_header_bytes(map(measure, specs)) == len(encode_header(specs))


def test_equals_a_file_on_disk(tmp_path: Path) -> None:
    specs = [TensorSpec(name=f"layer.{i}", dtype="F16", shape=(i, 5)) for i in range(40)]
    tensors = {spec.name: torch.zeros(spec.shape, dtype=torch.float16) for spec in specs}
    save_file(tensors, tmp_path / "a.safetensors", METADATA)
    assert (tmp_path / "a.safetensors").stat().st_size == sum_bytes(map(measure, specs))


def test_an_entry_counts_what_an_entry_adds() -> None:
    one = TensorSpec(name="a", dtype="F16", shape=(64,))
    two = TensorSpec(name="bé", dtype="F16", shape=(1000, 3))
    grown = encode_header([one, two]).rstrip(b" ")[8:]
    before = encode_header([one]).rstrip(b" ")[8:]
    assert len(grown) - len(before) == measure(two).length(128)


def test_shards_are_filled_in_order() -> None:
    specs = [TensorSpec(name=str(i), dtype="I8", shape=(n,)) for i, n in enumerate((4, 5, 2, 20))]
    assert [[s.name for s in shard] for shard in split_shards(specs, 9)] == [
        ["0", "1"],
        ["2"],
        ["3"],
    ]
    assert [[s.name for s in shard] for shard in split_shards(specs, 8)] == [
        ["0"],
        ["1", "2"],
        ["3"],
    ]


@pytest.mark.parametrize(
    ("count", "first"), [(1, "model.safetensors"), (3, "model-00001-of-00003.safetensors")]
)
def test_shard_names(count: int, first: str) -> None:
    assert name_shards(count)[0] == first
    assert len(name_shards(count)) == count
