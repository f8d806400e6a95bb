"""Refusals of the draft, and its notices."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cptq.artifact.formats.compressed_tensors import check_layer
from cptq.artifact.weights import write_weights
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ArtifactError
from cptq.types import CompressedLayer, Plan, TensorSpec
from tests.conftest import TinyModel
from tests.unit.artifact.builders import compress, load, write

Made = tuple[LoadedModel, list[CompressedLayer], Plan]


def test_a_tensor_that_is_not_what_was_planned(tmp_path: Path) -> None:
    spec = TensorSpec(name="t", dtype="F16", shape=(2, 2))
    for wrong in (torch.zeros(2, 2), torch.zeros(2, 3).half()):
        with pytest.raises(ArtifactError, match=r"^t is torch"):
            write_weights(tmp_path, [spec], lambda s, wrong=wrong: wrong)


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "model.safetensors"])
def test_extras_stay_inside(made: Made, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(repr(name))):
        write(*made, tmp_path / "out", extras={name: b""})


def test_a_conv1d_is_refused(made: Made, tmp_path: Path) -> None:
    model, layers, plan = made
    spec = replace(layers[0].spec, kind="conv1d", transposed=True)
    wrong = replace(layers[0], spec=spec)
    with pytest.raises(ArtifactError, match=f"{spec.name}.*Conv1D.*w16"):
        write(model, [wrong, *layers[1:]], plan, tmp_path / "out")


def test_layers_that_cannot_be_right_are_refused(made: Made) -> None:
    layer = made[1][0]
    zero = layer.scale.clone()
    zero[0, 0] = 0
    wrong = {
        r"scale.*\b0\b": replace(layer, scale=zero),
        r"float32 scales.*F16": replace(layer, scale=layer.scale.float()),
        r"scales \(\d+, \d+\)": replace(layer, scale=layer.scale[:-1]),
        r"codes torch\.int8": replace(layer, codes=layer.codes[:, :-1]),
        r"embedding": replace(layer, spec=replace(layer.spec, kind="embedding")),
    }
    check_layer(layer)
    for words, bad in wrong.items():
        with pytest.raises(ArtifactError, match=words):
            check_layer(bad)


def test_a_layer_given_twice_or_unknown(made: Made, tmp_path: Path) -> None:
    model, layers, plan = made
    with pytest.raises(ArtifactError, match=f"{layers[0].spec.weight_name} .*twice"):
        write(model, [*layers, layers[0]], plan, tmp_path / "out")
    other = replace(layers[0], spec=replace(layers[0].spec, name="nope"))
    with pytest.raises(ArtifactError, match=r"nope\.weight .*not"):
        write(model, [other], plan, tmp_path / "out")


def test_values_rounded_by_the_run_type_are_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(tiny_model("bert"))
    layers, plan = compress(model)
    model.module.to(torch.bfloat16)
    events: list[Any] = []
    write(model, layers, plan, tmp_path / "out", events=events)
    assert any(getattr(e, "kind", "") == "warning" and "float32" in e.message for e in events)


def test_an_artifact_is_not_compressed_again(made: Made, tmp_path: Path) -> None:
    model, layers, plan = made
    model.quantized = True
    try:
        with pytest.raises(ArtifactError, match=re.escape(model.source)):
            write(model, layers, plan, tmp_path / "out")
    finally:
        model.quantized = False


def test_a_corrupt_codes_range_never_reaches_the_disk(made: Made, tmp_path: Path) -> None:
    model, layers, plan = made
    layer = next(x for x in layers if x.result.candidate.bits == 2)
    bad = replace(layer, codes=layer.codes + 5)
    with pytest.raises(ValueError, match="outside"):
        write(model, [bad], plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_reference_of_a_layer_is_what_is_unpacked(made: Made, tmp_path: Path) -> None:
    """Load one layer with compressed-tensors itself, apart from transformers."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model, layers, plan = made
    artifact = write(model, layers, plan, tmp_path / "out")
    stored = load_file(artifact.path / "model.safetensors")
    for layer in layers:
        name, bits = layer.spec.name, layer.result.candidate.bits
        codes = unpack_from_int32(
            stored[f"{name}.weight_packed"], bits, torch.Size(stored[f"{name}.weight_shape"])
        )
        assert torch.equal(codes, layer.codes)
        assert torch.equal(stored[f"{name}.weight_scale"], layer.scale)


def test_save_file_keeps_the_size(made: Made, tmp_path: Path) -> None:
    """Saved again by the library the file has the same bytes."""
    artifact = write(*made, tmp_path / "out")
    tensors = load_file(artifact.path / "model.safetensors")
    save_file(tensors, tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").stat().st_size == artifact.weight_bytes
