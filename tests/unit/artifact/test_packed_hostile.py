"""Packed artifacts that are truncated, forged or of another version: one clear error each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cptq
from cptq.errors import ArtifactError, CptqError
from cptq.inference.checks import read_modules
from tests.conftest import TinyModel
from tests.unit.artifact.packed_builders import write_packed

FILE = "cptq.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ("w4g16-asym", "w4g16-s50", "w8c-2:4")
    out = tmp_path_factory.mktemp("packed") / "out"
    return write_packed(tiny_model("llama", dtype=torch.float16), out, labels)[2].path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def refused(path: Path, words: str) -> None:
    """`cptq.load` and transformers both refuse it with the same error."""
    with pytest.raises(CptqError, match=words):
        cptq.load(path, device="cpu")
    with pytest.raises(CptqError, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda q: q.update(format_version=6),
            r"version 6\b.*; allowed: version 1, 2, 3, 4 or 5",
        ),
        (lambda q: q.pop("modules"), "packed modules"),
        (lambda q: q.update(modules=["a"]), "packed modules"),
        (lambda q: q["modules"].update({LAYER: "w4g16; rm"}), "'w4g16; rm'"),
        (lambda q: q["modules"].update({LAYER: 4}), f"{LAYER}' as 4"),
        (lambda q: q["modules"].update({LAYER: "w16"}), f"{LAYER}' as 'w16'"),
        (lambda q: q["modules"].update({LAYER: "w4g016"}), "'w4g016'"),
        (lambda q: q["modules"].update({LAYER: "w4g17"}), r"w4g17.*\b17\b.*\b48\b"),
        (lambda q: q["modules"].update({LAYER: "w9c"}), "'w9c'"),
        (lambda q: q["modules"].update({LAYER: "w2c"}), "w2c.* I32"),
        (lambda q: q["modules"].update({LAYER: "w4g16-s100"}), r"w4g16-s100"),
        (
            lambda q: q["modules"].update({"lm_head.absent": "w4c"}),
            r"lm_head\.absent.*LlamaForCausalLM",
        ),
        (lambda q: q["modules"].update({"model.norm": "w4c"}), r"model\.norm.*LlamaRMSNorm.*w4c"),
        (
            lambda q: q["modules"].update({"model.embed_tokens": "w4c-s50"}),
            r"embed_tokens.*Embedding.*w4c-s50",
        ),
        (lambda q: q.update(weights="../out/cptq.safetensors"), r"'\.\./out"),
        (lambda q: q.update(weights="/etc/passwd"), "allowed: cptq.safetensors"),
    ],
)
def test_a_config_that_does_not_fit(
    copy: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_config(copy, change)
    refused(copy, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][1:]}), f"{LAYER}.*I32"),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].long()}),
            r"is I64 \[",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].int()}),
            r"weight_scale.*I32.*F32 or F16",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    tensors = load_file(copy / FILE)
    change(tensors)
    (copy / FILE).unlink()
    save_file(tensors, copy / FILE, {"format": "pt"})
    refused(copy, words)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_file(copy: Path, keep: float) -> None:
    raw = (copy / FILE).read_bytes()
    count = int(keep * len(raw)) if 0 < keep < 1 else int(keep)
    (copy / FILE).write_bytes(raw[:count])
    with pytest.raises(CptqError, match=r"cptq\.safetensors is corrupt"):
        cptq.load(copy, device="cpu")
    with pytest.raises(Exception, match=r"(?i)header|invalid|incomplete|cannot be"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)


def test_a_file_that_claims_absurd_shapes(copy: Path) -> None:
    """The header is compared before anything of its size is allocated."""
    raw = (copy / FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[f"{LAYER}.weight"]["shape"] = [1 << 40, 1 << 20]
    text = json.dumps(header).encode()
    (copy / FILE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CptqError, match=r"cptq\.safetensors is corrupt"):
        cptq.load(copy, device="cpu")


def test_a_file_that_is_not_there(copy: Path) -> None:
    (copy / FILE).unlink()
    with pytest.raises(CptqError, match=r"has no model\.safetensors"):
        cptq.load(copy, device="cpu")


@pytest.mark.parametrize("part", ["weight_pattern", "weight_mask"])
def test_places_that_the_codes_cannot_fill(copy: Path, part: str) -> None:
    tensors = load_file(copy / FILE)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = torch.full_like(tensors[name], -1)
    (copy / FILE).unlink()
    save_file(tensors, copy / FILE, {"format": "pt"})
    refused(copy, r"positions.*model\.layers")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    ),
    st.none() | st.integers() | st.text(max_size=3),
)
def test_any_json_is_a_table_of_schemes_or_an_error(modules: Any, version: Any) -> None:
    try:
        found = read_modules(modules, version)
    except ArtifactError:
        return
    assert version == 1
    assert all(isinstance(label, str) for label in found.values())


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_of_the_header_are_an_error_or_change_nothing(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    copy = tmp_path / "flipped"
    if not copy.exists():
        shutil.copytree(whole, copy)
    raw = bytearray((whole / FILE).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    place = data.draw(st.integers(0, 7 + length))
    raw[place] ^= data.draw(st.integers(1, 255))
    (copy / FILE).write_bytes(bytes(raw))
    try:
        model = cptq.load(copy, device="cpu")
    except CptqError:
        return
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape[-1] == 300
