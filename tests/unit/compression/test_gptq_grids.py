"""`gptq` on asymmetric grids and under masks, against elimination; and the embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cptq.compression import gptq, nearest
from cptq.compression.embeddings import compress_embeddings, embedding_tensors
from cptq.compression.gptq import DAMPING
from cptq.compression.layer import LayerProblem, LayerSolution, compress_layer
from cptq.config import RUNTIMES
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.grid import dequantize, dequantize_layer, fit_grid
from cptq.numerics.masks import build_magnitude_mask, build_two_of_four_mask
from cptq.types import Candidate, Event, LayerSpec
from tests.conftest import TinyModel
from tests.reference import gptq as truth
from tests.unit.artifact.builders import load

SHAPES = [(5, 7, 7), (3, 33, 11), (4, 40, 8), (2, 150, 30)]


def problem(out: int, features: int, group: int, bits: int, **options: object) -> LayerProblem:
    generator = torch.Generator().manual_seed(out + features)
    shape = (4 * features, features)
    X_TI = torch.randn(shape, generator=generator, dtype=torch.float64)
    X_TI += 2 * torch.randn(len(X_TI), 1, generator=generator, dtype=torch.float64)
    W_OI = torch.randn(out, features, generator=generator, dtype=torch.float64) + 0.5
    asked = LayerProblem(
        W_OI=W_OI, H_II=X_TI.T @ X_TI / len(X_TI), bits=bits, group=group, scale_dtype=torch.float64
    )
    return replace(asked, **options)  # type: ignore[arg-type]


def values(found: LayerSolution) -> Tensor:
    return dequantize(found.codes_OI, found.scale_OG, found.zero_OG, dtype=torch.float64)


def output_error(asked: LayerProblem, Q_OI: Tensor) -> float:
    D_OI = asked.W_OI - Q_OI
    return float(((D_OI @ asked.H_II) * D_OI).sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "features", "group"), SHAPES)
def test_equals_brain_surgery_by_elimination(
    out: int, features: int, group: int, bits: int, symmetric: bool, masked: bool
) -> None:
    asked = problem(out, features, group, bits, symmetric=symmetric)
    mask_OI = build_magnitude_mask(asked.W_OI, 0.4) if masked else None
    asked = replace(asked, mask_OI=mask_OI)
    kept_OI = asked.W_OI if mask_OI is None else asked.W_OI * mask_OI
    options = {"scale_dtype": torch.float64, "importance_I": truth.prices(asked.H_II, DAMPING)}
    scale_OG, zero_OG = fit_grid(kept_OI, bits, group, symmetric=symmetric, **options)
    assert (zero_OG is None) == symmetric
    codes_OI = truth.sweep(asked.W_OI, asked.H_II, scale_OG, bits, DAMPING, zero_OG, mask_OI)
    found = gptq.compress(asked)
    assert float((found.codes_OI == codes_OI).double().mean()) > 0.99
    if zero_OG is not None:
        assert found.zero_OG is not None
        assert torch.equal(found.zero_OG, zero_OG)
        steps = codes_OI - zero_OG.double().repeat_interleave(group, dim=1)
    else:
        steps = codes_OI
    H_II = truth.damped(asked.H_II, DAMPING)
    best_OG = truth.best_scales(asked.W_OI, H_II, steps, scale_OG)
    best = output_error(asked, steps * best_OG.repeat_interleave(group, dim=1))
    assert output_error(asked, values(found)) == pytest.approx(best, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("method", [gptq.compress, nearest.compress])
@pytest.mark.parametrize("symmetric", [False, True])
def test_masked_weights_are_exactly_zero(method, symmetric: bool) -> None:  # type: ignore[no-untyped-def]
    asked = problem(6, 40, 8, 3, symmetric=symmetric)
    mask_OI = build_two_of_four_mask(asked.W_OI)
    found = method(replace(asked, mask_OI=mask_OI))
    assert bool((values(found)[~mask_OI] == 0).all())
    assert bool((values(found)[mask_OI] != 0).any())


def test_compensation_beats_the_mask_alone() -> None:
    asked = problem(6, 40, 8, 4)
    asked = replace(asked, mask_OI=build_magnitude_mask(asked.W_OI, 0.5))
    swept, rounded = (output_error(asked, values(m.compress(asked))) for m in (gptq, nearest))
    assert swept < 0.5 * rounded


@pytest.mark.parametrize("label", ["w4g8-s50", "w3c-asym-s60", "w4g8-2:4", "w4g8-asym-2:4"])
def test_a_sparse_candidate_keeps_what_matters_most(label: str) -> None:
    asked = problem(6, 40, 8, 4)
    spec = LayerSpec(name="x", block=0, role="q", kind="linear", shape=(6, 40), dtype="F32")
    choice = Candidate.parse(label)
    W_OI, H_II = asked.W_OI.float(), asked.H_II.float()
    layer = compress_layer(spec, W_OI, H_II, choice, gptq.compress, PACKED_LAYOUT)
    assert layer.mask is not None
    score_OI = W_OI * H_II.diagonal().sqrt()
    if choice.pattern == "2:4":
        for row, kept in zip(score_OI.view(-1, 4), layer.mask.view(-1, 4), strict=True):
            order = sorted(range(4), key=lambda k, row=row: -abs(float(row[k])))  # type: ignore[misc]
            assert {k for k in range(4) if kept[k]} == set(order[:2])
    else:
        assert torch.equal(layer.mask, build_magnitude_mask(score_OI, choice.sparsity))
    assert bool((dequantize_layer(layer, torch.float32)[~layer.mask] == 0).all())
    assert layer.result.nbytes == sum(t.nbytes for t in PACKED_LAYOUT.tensors(spec, choice))


@pytest.mark.parametrize(
    ("arch", "options", "names"),
    [
        ("llama", {"tied": True}, ["model.embed_tokens"]),
        ("llama", {"tied": False}, ["model.embed_tokens", "lm_head"]),
        ("gpt2", {}, ["transformer.wte"]),
        ("bert", {}, ["bert.embeddings.word_embeddings"]),
    ],
)
def test_embeddings_and_heads_are_rounded(
    tiny_model: TinyModel, arch: str, options: dict[str, bool], names: list[str]
) -> None:
    model, events = load(tiny_model(arch, **options)), []
    before = {name: model.linear(name).weight.clone() for name in names}
    choice = Candidate(bits=8, group_size=16, symmetric=False)
    tensors = embedding_tensors(model, choice, PACKED_LAYOUT, RUNTIMES["cptq"], events.append)
    layers = compress_embeddings(model, choice, PACKED_LAYOUT, RUNTIMES["cptq"])
    assert [layer.spec.name for layer in layers] == names
    assert set(tensors) == {f"{name}.weight" for name in names}
    for layer in layers:
        weight = model.linear(layer.spec.name).weight
        assert torch.equal(weight, dequantize_layer(layer, torch.float32))
        gap = float((weight - before[layer.spec.name]).square().sum())
        energy = float(before[layer.spec.name].square().sum())
        assert layer.result.weight_error == pytest.approx(gap / energy, rel=1e-4)
        assert layer.result.weight_error < 1e-4
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    if options.get("tied"):
        assert torch.equal(head.weight, dequantize_layer(layers[0], torch.float32))


def test_an_embedding_that_does_more_is_left_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(tiny_model("llama"))

    class Scaled(torch.nn.Embedding):
        pass

    scaled = Scaled(300, 48)
    model.module.set_input_embeddings(scaled)  # type: ignore[operator]
    events: list[Event] = []
    choice = Candidate(bits=8, group_size=16)
    tensors = embedding_tensors(model, choice, PACKED_LAYOUT, RUNTIMES["cptq"], events.append)
    assert "model.embed_tokens.weight" not in tensors
    assert "a Scaled, which does more than look up" in str(events[0])
