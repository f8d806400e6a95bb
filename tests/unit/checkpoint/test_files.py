"""What is refused before a single weight is read: damaged, hostile and missing files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cptq.checkpoint.files import (
    compute_fingerprint,
    find_pickle_files,
    find_weight_files,
    read_config,
    read_header,
    read_tensor_specs,
)
from cptq.errors import ModelError
from cptq.types import TensorSpec
from tests.conftest import TinyModel
from tests.unit.checkpoint.made import entry, write_raw

INDEX = "model.safetensors.index.json"
#: more brackets than Python's recursion limit
DEEP = "[" * 100_000
TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F16", [2, 2], 8, 16)}


def test_a_header_is_read_in_file_order(tmp_path: Path) -> None:
    header = {
        "late": entry("F16", [3], 12, 18),
        "__metadata__": {"format": "pt"},
        "early": entry("F32", [1, 3], 0, 12),
        "scalar": entry("I64", [], 18, 26),
        "empty": entry("F32", [0, 5], 26, 26),
    }
    specs = read_header(write_raw(tmp_path / "model.safetensors", header, bytes(26)))
    assert list(specs.values()) == [
        TensorSpec(name="early", dtype="F32", shape=(1, 3)),
        TensorSpec(name="late", dtype="F16", shape=(3,)),
        TensorSpec(name="scalar", dtype="I64", shape=()),
        TensorSpec(name="empty", dtype="F32", shape=(0, 5)),
    ]


def test_a_header_agrees_with_safetensors(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "n": torch.zeros(7),
        "i": torch.zeros(2, dtype=torch.int64),
        "q": torch.zeros(9, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    specs = read_header(tmp_path / "model.safetensors")
    assert {n: s.shape for n, s in specs.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {n: s.nbytes for n, s in specs.items()} == {n: t.nbytes for n, t in tensors.items()}


@pytest.mark.parametrize("missing", [1, 7, 16])
def test_a_truncated_file_is_refused(tmp_path: Path, missing: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", TWO, bytes(16 - missing))
    with pytest.raises(ModelError, match=rf"\b16 .*\b{16 - missing}\b"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_a_file_without_room_for_a_header_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ModelError, match=re.escape(str(path))):
        read_header(path)


@pytest.mark.parametrize("length", [10_000, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", TWO, bytes(16), length=length)
    with pytest.raises(ModelError, match=rf"\b{length:,} "):
        read_header(path)


def test_a_pointer_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    """What `git clone` leaves where git-lfs is not installed."""
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match=re.escape(str(path))) as caught:
        read_header(path)
    assert "download" in str(caught.value.hint)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"\xff\xfe\x00garbage",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}',
        b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}',
        DEEP.encode(),
    ],
    ids=lambda raw: repr(raw[:50]),
)
def test_a_corrupt_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    ("b", "size"),
    [
        (entry("F16", [2, 2], 4, 12), 12),
        (entry("F16", [2, 2], 0, 8), 8),
        (entry("F16", [2, 2], 10, 18), 18),
        (entry("F16", [2, 3], 8, 16), 16),
        (entry("F32", [2, 2], 8, 16), 16),
        (entry("F16", [2, 2], 8, 4), 8),
        (entry("F16", [-2, -2], 8, 16), 16),
        (entry("F16", [2, 2], 8, 17), 17),
    ],
    ids=[
        "overlap",
        "same place",
        "gap",
        "shape too large",
        "type too large",
        "backwards",
        "negative shape",
        "too long",
    ],
)
def test_offsets_that_do_not_fit_are_refused(tmp_path: Path, b: object, size: int) -> None:
    header = {"a": entry("F32", [2], 0, 8), "b": b}
    path = write_raw(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(ModelError, match="'b'"):
        read_header(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", TWO, bytes(17))
    with pytest.raises(ModelError, match=r"\b16 .*\b17\b"):
        read_header(path)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry("F6", [4], 0, 3)}, bytes(3))
    with pytest.raises(ModelError, match=r"'a'.*\bF6\b"):
        read_header(path)


def test_shards_come_in_index_order_each_once(tmp_path: Path) -> None:
    names = ["two.safetensors", "one.safetensors"]
    for i, name in enumerate(names):
        write_raw(tmp_path / name, {f"t{i}": entry("F32", [1], 0, 4)}, bytes(4))
    weight_map = {"t0": names[0], "t1": names[1], "u": names[0]}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert find_weight_files(tmp_path) == [tmp_path / name for name in names]
    assert list(read_tensor_specs(tmp_path)) == ["t0", "t1"]


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: the files that are checked must be those that are loaded."""
    write_raw(tmp_path / "part.safetensors", TWO, bytes(16))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert find_weight_files(tmp_path) == [tmp_path / "part.safetensors"]
    write_raw(tmp_path / "model.safetensors", TWO, bytes(16))
    assert find_weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_pickles_are_found_by_the_same_rules(tmp_path: Path) -> None:
    names = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}))
    with pytest.raises(ModelError, match=r"'pytorch_model-1\.bin'"):
        find_pickle_files(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert find_pickle_files(tmp_path) == [tmp_path / name for name in names]
    assert find_weight_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert find_pickle_files(tmp_path) == [tmp_path / "pytorch_model.bin"]


def test_a_directory_without_weights_has_no_files(tmp_path: Path) -> None:
    assert find_weight_files(tmp_path) == []
    assert read_tensor_specs(tmp_path) == {}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"'gone-1\.safetensors'"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x.safetensors", "{outside}"])
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    """The file exists and is sound: it is its place that is refused."""
    outside = write_raw(tmp_path / "x.safetensors", TWO, bytes(16))
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    name = name.format(outside=outside)
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=re.escape(repr(name))) as caught:
        find_weight_files(inside)
    assert "inside" in str(caught.value.allowed)


def test_a_shard_that_links_into_a_blob_store_is_accepted(tmp_path: Path) -> None:
    """The layout of the Hub's cache."""
    blob = write_raw(tmp_path / "blob", TWO, bytes(16))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    os.symlink(blob, snapshot / "part.safetensors")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert list(read_tensor_specs(snapshot)) == ["a", "b"]


@pytest.mark.parametrize("name", ["", ".", "sub"])
def test_a_shard_that_is_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=re.escape(repr(name))):
        read_tensor_specs(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{not json", "[]", "null", "3", "{}", "\udcff", DEEP],
    ids=lambda text: repr(text[:20]),
)
def test_an_invalid_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=re.escape(INDEX)):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, 3, "model.safetensors", ["a"], {"a": 1}, {"a": None}])
def test_an_invalid_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="weight_map"):
        find_weight_files(tmp_path)


def test_the_fingerprint_depends_on_every_byte_and_on_the_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abd")
    prints = {compute_fingerprint(paths) for paths in ([one], [two], [one, two], [two, one], [])}
    assert len(prints) == 5
    assert all(len(value) == 64 for value in prints)
    before = compute_fingerprint([one])
    one.write_bytes(b"abe")
    assert compute_fingerprint([one]) != before


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"text"', "\udcff", DEEP], ids=lambda text: repr(text[:20])
)
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_config_is_read_as_plain_data(tiny_model: TinyModel) -> None:
    assert read_config(tiny_model("opt"))["model_type"] == "opt"
