"""`gptq` against optimal brain surgery by elimination, and against rounding to nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cptq.compression import COMPRESSORS, gptq, nearest
from cptq.compression.gptq import DAMPING
from cptq.compression.layer import LayerProblem, LayerSolution
from cptq.errors import UnknownNameError
from cptq.layouts.levels import get_levels
from cptq.numerics.grid import dequantize, fit_grid, get_code_range, quantize_nearest
from tests.quick import cover
from tests.reference import gptq as truth

BITS = range(2, 9)
#: out, in, group; 150 inputs are more than one block of the sweep
SHAPES = [(5, 7, 7), (3, 33, 11), (4, 40, 8), (2, 150, 30), (6, 4, 1), (3, 1, 1)]


def inputs(features: int, *, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated rows, (tokens, in) float64."""
    generator = torch.Generator().manual_seed(features)
    mixing_II = torch.randn(features, features, generator=generator, dtype=torch.float64)
    mixing_II += 2 * torch.randn(features, 1, generator=generator, dtype=torch.float64)
    shape = (4 * features + 8, features)
    X_TI = torch.randn(shape, generator=generator, dtype=torch.float64) @ mixing_II
    X_TI[:, list(dead)] = 0
    return X_TI


def problem(
    out: int, features: int, group: int, bits: int, *, dead: tuple[int, ...] = (), levels: str = ""
) -> LayerProblem:
    generator = torch.Generator().manual_seed(out)
    X_TI = inputs(features, dead=dead)
    return LayerProblem(
        W_OI=torch.randn(out, features, generator=generator, dtype=torch.float64),
        H_II=X_TI.T @ X_TI / len(X_TI),
        bits=bits,
        group=group,
        scale_dtype=torch.float64,
        levels=levels,
    )


def output_error(asked: LayerProblem, codes_OI: Tensor, scale_OG: Tensor) -> float:
    """E |x (W - Q)|^2."""
    D_OI = asked.W_OI.double() - dequantize(codes_OI, scale_OG, dtype=torch.float64)
    return float(((D_OI @ asked.H_II.double()) * D_OI).sum())


def reference(asked: LayerProblem, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Codes and the scales that are best for them."""
    scale_OG, _ = fit_grid(
        asked.W_OI,
        asked.bits,
        asked.group,
        scale_dtype=torch.float64,
        importance_I=truth.prices(asked.H_II, damping),
        levels=asked.levels,
    )
    table = get_levels(asked.levels, asked.bits) if asked.levels else None
    codes_OI = truth.sweep(asked.W_OI, asked.H_II, scale_OG, asked.bits, damping, levels=table)
    H_II = truth.damped(asked.H_II, damping, never=1e-3)
    return codes_OI, truth.best_scales(asked.W_OI, H_II, codes_OI, scale_OG)


def agree(asked: LayerProblem, found: LayerSolution, expected: tuple[Tensor, Tensor]) -> None:
    """Equal but for a rounding that was a tie."""
    codes_OI, scale_OG = expected
    same_OI = found.codes_OI == codes_OI
    assert float(same_OI.double().mean()) > 0.99
    same_O = same_OI.all(1)
    torch.testing.assert_close(
        found.scale_OG[same_O].double(), scale_OG[same_O], rtol=1e-3, atol=1e-5
    )
    error = output_error(asked, found.codes_OI, found.scale_OG)
    assert error == pytest.approx(output_error(asked, codes_OI, scale_OG), rel=0.01, abs=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "features", "group"), SHAPES)
def test_equals_brain_surgery_by_elimination(
    out: int, features: int, group: int, bits: int
) -> None:
    asked = problem(out, features, group, bits)
    found = gptq.compress(asked)
    agree(asked, found, reference(asked))
    assert found.notes == ()
    assert found.codes_OI.dtype is torch.int8
    low, high = get_code_range(bits)
    assert low <= int(found.codes_OI.min()) <= int(found.codes_OI.max()) <= high


@pytest.mark.parametrize(
    ("kind", "bits"), [("nl", 2), ("nl", 3), ("nl", 4), ("nl", 6), ("iq4nl", 4)]
)
def test_uneven_levels_equal_brain_surgery_too(kind: str, bits: int) -> None:
    for out, features, group in SHAPES[2:4]:
        asked = problem(out, features, group, bits, levels=kind)
        found = gptq.compress(asked)
        agree(asked, found, reference(asked))
        assert set(found.codes_OI.unique().tolist()) <= set(get_levels(kind, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dead", [(0,), (3, 9, 10), tuple(range(5, 10)), tuple(range(1, 15))])
def test_dead_inputs_get_their_nearest_codes(bits: int, dead: tuple[int, ...]) -> None:
    asked = problem(4, 15, 5, bits, dead=dead)
    found = gptq.compress(asked)
    assert bool(found.codes_OI[:, list(dead)].any())
    assert bool((found.scale_OG != 0).all())
    agree(asked, found, reference(asked))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dead_inputs_are_worth_keeping_and_cost_the_others_nothing(bits: int) -> None:
    """After a ReLU an input that is 0 on the calibration text fires on another one."""
    dead = [3, 9, 10, 12]
    asked, live = problem(16, 64, 16, bits, dead=tuple(dead)), problem(16, 64, 16, bits)
    found = gptq.compress(asked)
    zeroed_OI = asked.W_OI.clone()
    zeroed_OI[:, dead] = 0
    before = gptq.compress(replace(asked, W_OI=zeroed_OI))
    on_text = replace(asked, W_OI=zeroed_OI)
    kept_OI = found.codes_OI.clone()
    kept_OI[:, dead] = 0
    cost = output_error(on_text, kept_OI, found.scale_OG)
    assert cost <= output_error(on_text, before.codes_OI, before.scale_OG) * 1.05
    elsewhere = replace(asked, H_II=live.H_II)
    gain = output_error(elsewhere, before.codes_OI, before.scale_OG)
    assert output_error(elsewhere, found.codes_OI, found.scale_OG) < gain / 2


@pytest.mark.parametrize("dead", [(), (3, 9, 10)])
def test_the_scale_of_the_inputs_changes_nothing(dead: tuple[int, ...]) -> None:
    asked = problem(4, 15, 5, 3, dead=dead)
    found = gptq.compress(asked)
    quiet = gptq.compress(replace(asked, H_II=asked.H_II * 2.0**-20))
    assert torch.equal(quiet.codes_OI, found.codes_OI)
    torch.testing.assert_close(quiet.scale_OG, found.scale_OG)


def test_inputs_that_are_all_dead() -> None:
    """An expert that no token reaches keeps its weights: nothing says that they are worth none."""
    asked = problem(4, 6, 3, 3)
    found = gptq.compress(replace(asked, H_II=torch.zeros_like(asked.H_II)))
    rounded = nearest.compress(asked)
    assert torch.equal(found.codes_OI, rounded.codes_OI)
    assert torch.equal(found.scale_OG, rounded.scale_OG)
    assert found.notes == ("no calibration token reaches it: rounded to nearest",)


@pytest.mark.parametrize(
    ("bits", "group", "scale_dtype"),
    cover(BITS, [8, 24, 48], [torch.float16, torch.bfloat16]),
)
def test_the_output_comes_nearer_than_by_rounding(
    bits: int, group: int, scale_dtype: torch.dtype
) -> None:
    exact = problem(20, 48, group, bits)
    asked = replace(
        exact, W_OI=exact.W_OI.float(), H_II=exact.H_II.float(), scale_dtype=scale_dtype
    )
    swept, rounded = gptq.compress(asked), nearest.compress(asked)
    assert swept.scale_OG.dtype is scale_dtype
    assert swept.scale_OG.shape == rounded.scale_OG.shape == (20, 48 // group)
    errors = [output_error(asked, s.codes_OI, s.scale_OG) for s in (swept, rounded)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("bits", BITS)
def test_without_correlation_there_is_nothing_to_lose(bits: int) -> None:
    asked = problem(20, 48, 16, bits)
    asked = replace(asked, H_II=torch.diag(asked.H_II.diagonal()))
    swept, rounded = gptq.compress(asked), nearest.compress(asked)
    errors = [output_error(asked, s.codes_OI, s.scale_OG) for s in (swept, rounded)]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize(
    "H_II",
    [torch.full((6, 6), float("nan")), -torch.eye(6), torch.ones(6, 6) - 7 * torch.eye(6)],
    ids=["nan", "negative", "indefinite"],
)
def test_a_hopeless_hessian_falls_back_to_nearest_and_says_so(H_II: Tensor) -> None:
    asked = replace(problem(3, 6, 3, 4), H_II=H_II.double())
    found, rounded = gptq.compress(asked), nearest.compress(asked)
    assert torch.equal(found.codes_OI, rounded.codes_OI)
    assert torch.equal(found.scale_OG, rounded.scale_OG)
    assert len(found.notes) == 1
    assert "could not be factored" in found.notes[0]
    assert "nearest" in found.notes[0]


@pytest.mark.parametrize(("lowest", "used"), [(-0.05, 0.1), (-0.5, 1.0)])
def test_damping_that_had_to_be_raised_is_told(lowest: float, used: float) -> None:
    """H with one eigenvalue below zero, in shares of its mean diagonal."""
    asked = problem(4, 8, 4, 3)
    Q_II, _ = torch.linalg.qr(asked.H_II)
    values_I = torch.full((8,), (8 - lowest) / 7, dtype=torch.float64)
    values_I[0] = lowest
    asked = replace(asked, H_II=Q_II @ torch.diag(values_I) @ Q_II.T)
    found = gptq.compress(asked)
    assert found.notes == (f"damping raised from {DAMPING} to {used:g}",)
    expected_OI, _ = reference(asked, used)
    assert float((found.codes_OI == expected_OI).double().mean()) > 0.9


def test_inputs_may_come_in_any_order() -> None:
    asked = problem(5, 21, 21, 3)
    order_I = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    mixed = replace(asked, W_OI=asked.W_OI[:, order_I], H_II=asked.H_II[order_I][:, order_I])
    found, other = gptq.compress(asked), gptq.compress(mixed)
    assert torch.equal(other.codes_OI, found.codes_OI[:, order_I])
    torch.testing.assert_close(other.scale_OG, found.scale_OG, rtol=1e-6, atol=0)


def test_outputs_do_not_know_of_each_other() -> None:
    asked = problem(6, 20, 5, 3)
    whole, part = gptq.compress(asked), gptq.compress(replace(asked, W_OI=asked.W_OI[2:4]))
    assert torch.equal(part.codes_OI, whole.codes_OI[2:4])
    torch.testing.assert_close(part.scale_OG, whole.scale_OG[2:4], rtol=1e-6, atol=0)


def test_the_size_of_the_inputs_does_not_matter() -> None:
    asked = problem(6, 20, 5, 3)
    for factor in (2.0**-20, 2.0**20):
        found = gptq.compress(replace(asked, H_II=asked.H_II * factor))
        assert torch.equal(found.codes_OI, gptq.compress(asked).codes_OI)


def test_what_is_asked_is_not_changed() -> None:
    asked = problem(4, 15, 5, 3, dead=(2,))
    before = asked.W_OI.clone(), asked.H_II.clone()
    gptq.compress(asked)
    assert torch.equal(asked.W_OI, before[0])
    assert torch.equal(asked.H_II, before[1])


def test_nearest_asks_for_no_activations() -> None:
    asked = problem(4, 15, 5, 3)
    found = nearest.compress(replace(asked, H_II=torch.full((15, 15), float("nan"))))
    codes_OI, scale_OG, _ = quantize_nearest(asked.W_OI, 3, 5, scale_dtype=torch.float64)
    assert torch.equal(found.codes_OI, codes_OI)
    assert torch.equal(found.scale_OG, scale_OG)
    assert found.notes == ()


def test_compressors_go_by_name() -> None:
    assert COMPRESSORS.get("gptq") is gptq.compress
    assert COMPRESSORS.get("nearest") is nearest.compress
    with pytest.raises(UnknownNameError, match="unknown compressor 'gptk'"):
        COMPRESSORS.get("gptk")
