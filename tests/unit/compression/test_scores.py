"""What every score of masks must do: exact pattern, exact share, zeros that survive rounding."""

from __future__ import annotations

import pytest
import torch

from cptq.compression import COMPRESSORS, gptq
from cptq.compression.layer import build_layer_problem, compress_layer
from cptq.compression.scores import SCORES, Masking
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.grid import dequantize_layer
from cptq.types import Candidate, CompressedLayer, LayerSpec

LABELS = ("w4g8-s37", "w3c-asym-s50", "w4g16-2:4", "w2g8-asym-4:8", "w4g8-3:8")


def build(
    label: str, masking: Masking, name: str = "m", compressor: str = "gptq"
) -> tuple[CompressedLayer, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    W_OI = torch.randn(9, 48, generator=generator) + 0.3
    x_TI = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    x_TI[:, 5] = 0  # a dead input
    H_II = x_TI.T @ x_TI / len(x_TI)
    spec = LayerSpec(name=name, block=0, role="up", kind="linear", shape=(9, 48), dtype="F32")
    method = COMPRESSORS.get(compressor)
    candidate = Candidate.parse(label)
    return (
        compress_layer(spec, W_OI, H_II, candidate, method, PACKED_LAYOUT, masking=masking),
        W_OI,
        H_II,
    )


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("score", list(SCORES))
def test_pattern_and_share_are_exact_and_zeros_stay(score: str, label: str) -> None:
    layer, _, _ = build(label, Masking(score=score))
    candidate = Candidate.parse(label)
    assert layer.mask is not None
    if candidate.kept_of:
        kept, of = candidate.kept_of
        assert set(layer.mask.view(-1, of).sum(1).tolist()) == {kept}
    else:
        assert int((~layer.mask).sum()) == int(candidate.sparsity * layer.mask.numel() + 1e-9)
    Q_OI = dequantize_layer(layer, torch.float32)
    assert bool((Q_OI[~layer.mask] == 0).all())
    again, _, _ = build(label, Masking(score=score))
    assert torch.equal(again.codes, layer.codes)
    assert torch.equal(again.mask, layer.mask)


def test_lots_differ_by_seed_and_layer_alone() -> None:
    masks = [
        build("w4g8-s50", Masking(score="random", seed=s), n)[0].mask
        for s, n in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


def test_chosen_in_the_sweep_in_parts_it_is_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "LEAST_ROWS", 4)
    monkeypatch.setattr(gptq, "CHUNK", 1)
    layer, _, _ = build("w4g8-s37", Masking(score="sparsegpt"))
    assert layer.mask is not None
    assert int((~layer.mask).sum()) == int(0.37 * 9 * 48)


@pytest.mark.parametrize("label", LABELS)
def test_every_score_loses_less_than_lots(label: str) -> None:
    errors = {s: build(label, Masking(score=s))[0].result.output_error for s in SCORES}
    assert all(errors[s] < errors["random"] for s in ("wanda", "sparsegpt", "magnitude"))


def test_without_a_sweep_the_score_on_the_weights_as_they_are_chooses() -> None:
    layer, W_OI, H_II = build("w8c-s50", Masking(score="sparsegpt"), compressor="nearest")
    spec, candidate = layer.spec, layer.result.candidate
    asked = build_layer_problem(spec, W_OI, H_II, candidate, Masking(score="sparsegpt"))
    assert layer.mask is not None
    assert asked.mask_OI is not None
    assert torch.equal(layer.mask, asked.mask_OI)
