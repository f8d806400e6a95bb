"""Token embeddings and output heads: which there are, and how and when they are compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.replay import forward
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.compression import gptq, nearest
from cptq.compression.blockwise import compress_model
from cptq.compression.layer import LayerProblem, compress_layer
from cptq.compression.streams import measure_head_moment
from cptq.compression.vocabulary import (
    HEAD_DAMPING,
    choose_compressor,
    list_candidates,
)
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.float8 import FORMATS, round_to_float8
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, CompressedLayer, Event, Plan
from tests.conftest import TinyModel
from tests.reference import gptq as truth
from tests.reference.sensitivity import random_calibration
from tests.unit.artifact.builders import load

W4, W16 = Candidate(bits=4, group_size=16), Candidate(bits=16)


def quiet(_event: Event) -> None: ...


@pytest.mark.parametrize(
    ("arch", "options", "roles"),
    [
        ("llama", {"tied": True}, {"model.embed_tokens": "embedding+head"}),
        ("llama", {"tied": False}, {"model.embed_tokens": "embedding", "lm_head": "head"}),
        ("gpt2", {}, {"transformer.wte": "embedding+head"}),
        ("bert", {}, {"bert.embeddings.word_embeddings": "embedding"}),
    ],
)
def test_the_inventory_lists_each_stored_matrix_once(
    tiny_model: TinyModel, arch: str, options: dict[str, bool], roles: dict[str, str]
) -> None:
    model = load(tiny_model(arch, **options))
    assert {unit.name: unit.role for unit in model.vocabulary} == roles
    stored = {spec.name for spec in model.tensors}
    assert all(unit.layers[0].weight_name in stored for unit in model.vocabulary)
    assert not {unit.name for unit in model.units} & set(roles)


def carry_out(
    model: LoadedModel, batches: list[Batch], vocabulary: dict[str, Candidate], **options: Any
) -> dict[str, CompressedLayer]:
    choices = {unit.name: options.pop("blocks", W4) for unit in model.units} | vocabulary
    plan: Any = Plan(
        model_fingerprint=model.fingerprint, budget=None, allocator="by hand", metric=None,  # type: ignore[arg-type]
        table_digest=None, choices=choices, predicted_bytes=0, predicted_loss=None,
    )  # fmt: skip
    calibration = random_calibration(model)
    calibration = replace(calibration, batches=batches)
    usual = {"compressor": "gptq", "layout": PACKED_LAYOUT, "emit": quiet}
    layers = compress_model(model, calibration, plan, **(usual | options))
    return {layer.spec.name: layer for layer in layers}


def take_text(model: LoadedModel) -> list[Batch]:
    return list(random_calibration(model).batches)


def measure_by_hand(model: LoadedModel, batches: list[Batch]) -> Tensor:
    """E x x^T of what the head is given, over the real tokens, from whole passes, float64."""
    rows: list[Tensor] = []
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _module, args: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    handle.remove()
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in batches]
    x_TI = torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)])
    return x_TI.T @ x_TI / len(x_TI)


@pytest.mark.parametrize("tied", [True, False])
def test_the_moment_is_that_of_whole_passes(tiny_model: TinyModel, tied: bool) -> None:
    model = load(tiny_model("llama", tied=tied))
    batches = take_text(model)
    found = measure_head_moment(model, batches)
    assert torch.allclose(found.double(), measure_by_hand(model, batches), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compressor", ["gptq", "gptaq"])
def test_a_shared_matrix_goes_last_on_what_the_compressed_blocks_give(
    tiny_model: TinyModel, compressor: str
) -> None:
    model = load(tiny_model("llama", tied=True))
    batches = take_text(model)
    dense_OI = model.linear("model.embed_tokens").weight.clone()
    carry_out(model, batches, {}, compressor=compressor)  # the blocks alone
    H_II = measure_by_hand(model, batches).float()
    (unit,) = model.vocabulary
    method = choose_compressor(unit, gptq.compress)
    expected = compress_layer(unit.layers[0], dense_OI, H_II, W4, method, PACKED_LAYOUT)

    again = load(tiny_model("llama", tied=True))
    layers = carry_out(again, batches, {unit.name: W4}, compressor=compressor)
    found = layers[unit.name]
    assert float((found.codes == expected.codes).float().mean()) > 0.99
    head = again.module.get_output_embeddings()  # type: ignore[operator]
    assert torch.equal(head.weight, dequantize_layer(found, torch.float32))
    assert list(layers)[-1] == unit.name


def test_an_embedding_of_its_own_goes_first_and_is_rounded_to_nearest(
    tiny_model: TinyModel,
) -> None:
    model = load(tiny_model("llama", tied=False))
    batches = take_text(model)
    W_OI = model.linear("model.embed_tokens").weight.clone()
    choices = {"model.embed_tokens": W4, "lm_head": Candidate(bits=5, group_size=16)}
    layers = carry_out(model, batches, choices)
    assert next(iter(layers)) == "model.embed_tokens"
    assert list(layers)[-1] == "lm_head"
    spec = layers["model.embed_tokens"].spec
    plain = compress_layer(spec, W_OI, None, W4, nearest.compress, PACKED_LAYOUT)
    assert torch.equal(layers["model.embed_tokens"].codes, plain.codes)

    # the first block was calibrated on the rounded embedding
    other = load(tiny_model("llama", tied=False))
    apart = carry_out(other, batches, {})
    first = model.units[0].layers[0].name
    assert not torch.equal(layers[first].codes, apart[first].codes)


def test_a_head_has_less_output_error_than_to_nearest(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama", tied=False))
    H_II = measure_head_moment(model, take_text(model))
    unit = model.vocabulary[-1]
    W_OI = get_weight(model.linear(unit.name)).float()
    errors = [
        compress_layer(unit.layers[0], W_OI, H_II, W4, method, PACKED_LAYOUT).result.output_error
        for method in (choose_compressor(unit, gptq.compress), nearest.compress)
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(("out", "features"), [(5, 7), (9, 33), (40, 130)])
@pytest.mark.parametrize("name", FORMATS)
def test_float8_equals_brain_surgery_by_elimination(out: int, features: int, name: str) -> None:
    generator = torch.Generator().manual_seed(out)
    X_TI = torch.randn(4 * features, features, generator=generator, dtype=torch.float64)
    X_TI += 2 * torch.randn(len(X_TI), 1, generator=generator, dtype=torch.float64)
    H_II = X_TI.T @ X_TI / len(X_TI)
    W_OI = torch.randn(out, features, generator=generator, dtype=torch.float64) / 4
    asked = LayerProblem(
        W_OI=W_OI, H_II=H_II, bits=8, group=features, scale_dtype=torch.float64, float8=name
    ).damp(HEAD_DAMPING)
    found = gptq.compress(asked)
    assert found.codes_OI.dtype is FORMATS[name]
    assert bool((found.scale_OG == 1).all())
    expected_OI = sweep_by_elimination(W_OI, H_II, name)
    assert torch.equal(found.codes_OI.double(), expected_OI)
    gaps = [W_OI - q for q in (expected_OI, round_to_float8(W_OI, name).double())]
    own, plain = (float(((gap @ H_II) * gap).sum()) for gap in gaps)
    assert own < plain


def sweep_by_elimination(W_OI: Tensor, H_II: Tensor, name: str) -> Tensor:
    """Numbers of the format (out, in), a column at a time, from the explicit inverse."""
    W_OI, P_II = W_OI.clone(), truth.inverse(truth.damped(H_II, HEAD_DAMPING))
    Q_OI = torch.zeros_like(W_OI)
    for j in truth.visiting_order(H_II):
        Q_OI[:, j] = round_to_float8(W_OI[:, j], name).double()
        W_OI -= torch.outer(W_OI[:, j] - Q_OI[:, j], P_II[j] / P_II[j, j])
        P_II = truth._eliminated(P_II, j)
    return Q_OI


def test_float8_round_trips_through_the_layer(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama", tied=True))
    (unit,) = model.vocabulary
    choice = Candidate(bits=8, float8="e4m3")
    layers = carry_out(model, take_text(model), {unit.name: choice}, layout=PACK_QUANTIZED)
    layer = layers[unit.name]
    assert torch.equal(dequantize_layer(layer, torch.float32), layer.codes.float())
    assert torch.equal(model.linear(unit.name).weight, layer.codes.float())
    assert layer.result.nbytes == unit.numel
    assert 0 < layer.result.weight_error < 2e-3


def test_candidates_are_wide_enough_and_hold_the_better_floats() -> None:
    offered = [Candidate(bits=b, group_size=16) for b in (2, 3, 8)] + [W16]
    offered.append(Candidate(bits=4, group_size=16, sparsity=0.5, pattern="unstructured"))
    W_OI = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    labels = {c.label for c in list_candidates(W_OI, offered)}
    assert labels == {"w3g16", "w8g16", "w16", "f8e4m3"}
    assert "f8e5m2" in {c.label for c in list_candidates(W_OI / 1000, offered)}
    assert [c.label for c in list_candidates(W_OI, offered[:2])] == ["w3g16"]


def test_a_module_that_does_more_is_not_plain(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama", tied=True))
    (unit,) = model.vocabulary
    scaled = replace(unit.layers[0], plain=False)
    assert PACKED_LAYOUT.explain_refusal(unit.layers[0], W4) is None
    assert "does more than look up" in str(PACKED_LAYOUT.explain_refusal(scaled, W4))
    choice = Candidate(bits=8, float8="e4m3")
    assert PACK_QUANTIZED.explain_refusal(scaled, choice) is None
