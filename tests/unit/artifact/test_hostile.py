"""Truncated, bit-flipped, foreign and hostile files: one clear error, and no memory for it."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptq.artifact.gguf.header import read_gguf
from cptq.artifact.inspect import inspect
from cptq.artifact.reader import open_artifact
from cptq.artifact.verify import verify_artifact
from cptq.checkpoint.files import read_header
from cptq.errors import ArtifactError, CptqError
from tests.tiny_models import build_tiny_model
from tests.unit.artifact.builders import compress, load, sample_of, write

QUICK, LONG = 30, 3000
#: what reading a small damaged file may take beside the file itself
MEMORY = 8 << 20
HUGE = (2**63 - 1, 2**64 - 1, 10**30, -1, 0, 1.5, float("inf"), "7", None, True, [], {}, [[1]])

quick = settings(
    max_examples=QUICK,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
long = settings(quick, max_examples=LONG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an artifact (`ct`) and a GGUF file (`gguf`)."""
    place = tmp_path_factory.mktemp("hostile")
    source = build_tiny_model(
        place / "model",
        "llama",
        dtype=torch.float16,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    for form, name in (("compressed-tensors", "ct"), ("gguf", "gguf")):
        model = load(source)
        layers, plan = compress(model, bits=(4, 8, 16))
        write(model, layers, plan, place / name, form=form)
    return place


def survives(read: Callable[[Path], Any], path: Path) -> None:
    """It is read, or refused in a sentence; either costs next to no memory."""
    words = "read without an error"
    tracemalloc.start()
    try:
        read(path)
    except CptqError as error:
        words = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert 10 < len(words) < 2000
    assert peak < MEMORY, f"{peak:,} bytes"


def damaged(draw: st.DrawFn, raw: bytes, reach: int) -> bytes:
    """Cut off somewhere, bits flipped in the first `reach` bytes, or a number there replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "number", "insert"]))
    at = draw(st.integers(0, min(reach, len(raw)) - 9))
    if kind == "cut":
        return raw[:at]
    if kind == "flip":
        bit = draw(st.integers(0, 7))
        return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]
    number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
    return raw[:at] + struct.pack("<Q", number) + raw[at + (8 if kind == "number" else 0) :]


@st.composite
def damage(draw: st.DrawFn, raw: bytes, reach: int) -> bytes:
    return damaged(draw, raw, reach)


def fuzz_bytes(path: Path, reach: int, read: Callable[[Path], Any], how: settings) -> None:
    raw = path.read_bytes()
    copy = path.with_name(f"damaged{path.suffix}")

    @how
    @given(damage(raw, reach))
    def run(content: bytes) -> None:
        copy.write_bytes(content)
        survives(read, copy)

    run()
    copy.unlink()


@st.composite
def edited(draw: st.DrawFn, data: Any) -> Any:
    """The data with one value, anywhere in it, replaced, doubled or dropped."""
    data = json.loads(json.dumps(data))
    node, keys = data, list(data)
    while True:
        key = draw(st.sampled_from(keys))
        below = node[key]
        inner = (
            list(below)
            if isinstance(below, dict)
            else list(range(len(below or ())))
            if isinstance(below, list)
            else []
        )
        if not inner or draw(st.integers(0, 3)) == 0:
            break
        node, keys = below, inner
    if draw(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = draw(st.sampled_from(HUGE))
    return data


def fuzz_header(path: Path, read: Callable[[Path], Any], how: settings) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    copy = path.with_name("damaged.safetensors")

    @how
    @given(edited(header))
    def run(changed: Any) -> None:
        text = json.dumps(changed).encode()
        copy.write_bytes(len(text).to_bytes(8, "little") + text + data)
        survives(read, copy)

    run()
    copy.unlink()


def fuzz_manifest(directory: Path, read: Callable[[Path], Any], how: settings) -> None:
    path = directory / "cptq.json"
    before = path.read_bytes()

    @how
    @given(edited(json.loads(before)))
    def run(changed: Any) -> None:
        path.write_text(json.dumps(changed))
        survives(read, directory)

    try:
        run()
    finally:
        path.write_bytes(before)


def all_fuzz(made: Path, how: settings) -> None:
    weights = made / "ct" / "model.safetensors"
    gguf = next((made / "gguf").glob("*.gguf"))
    fuzz_bytes(weights, 6000, read_header, how)
    fuzz_header(weights, read_header, how)
    fuzz_header(weights, inspect, how)
    fuzz_bytes(gguf, gguf.stat().st_size, read_gguf, how)
    fuzz_bytes(gguf, 400, inspect, how)


def test_damaged_weight_files(made: Path) -> None:
    all_fuzz(made, quick)


def test_damaged_manifests(made: Path) -> None:
    fuzz_manifest(made / "ct", open_artifact, quick)
    fuzz_manifest(made / "ct", inspect, quick)


@pytest.mark.slow
def test_damaged_files_at_length(made: Path) -> None:
    all_fuzz(made, long)
    fuzz_manifest(made / "ct", open_artifact, long)
    fuzz_manifest(made / "ct", inspect, long)


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]} | changes
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"header.*\b0 bytes"),
        ((10**15).to_bytes(8, "little") + b"{}", r"header.* 1,000,000,000,000,000 bytes"),
        (header(data_offsets=[0, 10**12]), "offsets of 'a'"),
        (header(shape=[2**40, 2**40]), "offsets of 'a'"),
        (header(shape=[-2, -2]), "offsets of 'a'"),
        (header(shape=["2", "2"]), "'a'.*offsets"),
        (header(dtype="F4"), "'a'.*F4"),
        (header(data_offsets=[4, 8], shape=[1, 2]), "offsets of 'a'"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CptqError, match=words):
        inspect(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CptqError, match="offsets of 'b'"):
        inspect(path)


def test_an_index_that_leads_outside_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../etc/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CptqError, match=r"'\.\./\.\./etc/model\.safetensors'"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, r"99.*\b1\b"),
        ({"form": "nobody"}, "format 'nobody'"),
        ({"inventory": []}, r"cptq\.json is damaged"),
        ({"weight_files": {"../x": 1}}, r"'\.\./x'"),
        ({"weight_files": {"model.safetensors": 1}}, r"model\.safetensors.*[\d,]+ bytes.*\b1\b"),
        ({"tensors_sha256": {"x": "0"}}, r"tensor .*sha256"),
        ({"files_sha256": {"config.json": "0"}}, r"file config\.json.*sha256"),
        ({"sample": {"shape": [10**6, 10**6]}}, "sample.*'largest'"),
    ],
)
def test_a_foreign_or_hostile_manifest_is_refused(
    made: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    copy = shutil.copytree(made / "ct", tmp_path / "copy")
    manifest = json.loads((copy / "cptq.json").read_text())
    (copy / "cptq.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CptqError, match=words):
        open_artifact(copy) if "inventory" in change else verify_artifact(copy, lambda event: None)


def test_an_absurd_shape_is_refused_at_once(made: Path, tmp_path: Path) -> None:
    """Looking for a group size that divides it would take hours."""
    copy = shutil.copytree(made / "ct", tmp_path / "copy")
    manifest = json.loads((copy / "cptq.json").read_text())
    name = manifest["layers"][0]["name"]
    manifest["layers"][0]["candidate"] = f"w4g{10**14}"
    next(x for x in manifest["inventory"] if x["name"] == name)["shape"] = [8, 10**15 + 37]
    (copy / "cptq.json").write_text(json.dumps(manifest))
    with pytest.raises(CptqError, match=f"{name}.*8 x {10**15 + 37}"):
        open_artifact(copy)


def test_one_flipped_bit_of_a_weight_is_found(made: Path, tmp_path: Path) -> None:
    for form in ("ct", "gguf"):
        copy = shutil.copytree(made / form, tmp_path / form)
        path = next(p for p in copy.iterdir() if p.suffix in (".gguf", ".safetensors"))
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ArtifactError, match=r"tensor .*sha256"):
            verify_artifact(copy, lambda event: None)


def test_a_config_that_the_weights_cannot_be_of_is_refused(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "ct", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for name, value in (("num_hidden_layers", 10**9), ("hidden_size", 10**12)):
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CptqError, match=f"{name} {value:,}"):
            load(copy)


def test_the_made_artifact_is_whole(made: Path) -> None:
    """What the tests above damage is otherwise read."""
    model = load(made / "model")
    assert len(open_artifact(made / "ct").content.compressed) > 5
    assert sample_of(model).expected.numel() > 0
    assert inspect(made / "ct").weights == inspect(made / "model").weights
    assert {t.kind for t in read_gguf(next((made / "gguf").glob("*.gguf"))).tensors} >= {
        "Q4_0",
        "Q8_0",
        "F16",
        "F32",
    }
