"""`gptq` on asymmetric grids and under masks, against elimination."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cptq.compression import gptq, nearest
from cptq.compression.gptq import DAMPING
from cptq.compression.layer import LayerProblem, LayerSolution, compress_layer
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.grid import dequantize, dequantize_layer, fit_grid
from cptq.numerics.masks import build_magnitude_mask, build_n_of_m_mask
from cptq.types import Candidate, LayerSpec
from tests.quick import cover
from tests.reference import gptq as truth

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


@pytest.mark.parametrize(
    ("shape", "bits", "symmetric", "masked"),
    cover(SHAPES, [2, 3, 4, 8], [False, True], [False, True]),
)
def test_equals_brain_surgery_by_elimination(
    shape: tuple[int, int, int], bits: int, symmetric: bool, masked: bool
) -> None:
    out, features, group = shape
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
    mask_OI = build_n_of_m_mask(asked.W_OI, 2, 4)
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
