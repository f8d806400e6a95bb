"""The asymmetric target against a regression on the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.numerics.asymmetric_target import CrossMoment, compute_asymmetric_targets
from cptq.numerics.hessian import SecondMoment


def streams(tokens: int, features: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """What the dense model hands to a layer, and what reaches it: correlated, with an error."""
    draw = torch.Generator().manual_seed(features)
    mix = torch.randn(features, features, generator=draw)
    x = torch.randn(tokens, features, generator=draw) @ mix
    error = 0.3 * torch.randn(tokens, features, generator=draw) @ mix.roll(1, 0)
    seen = x + error
    x[:, list(dead)] = seen[:, list(dead)] = 0
    return x, seen


def moments(x: Tensor, seen: Tensor, parts: int = 3) -> tuple[Tensor, Tensor]:
    second, cross = SecondMoment(x.shape[1]), CrossMoment(x.shape[1])
    for a, b in zip(x.chunk(parts), seen.chunk(parts), strict=True):
        second.add(b)
        cross.add(a, b)
    return second.mean_II, cross.finish()


def compute_asymmetric_target(W: Tensor, H: Tensor, C: Tensor, **options: float) -> Tensor:
    (target,) = compute_asymmetric_targets([W], H, C, **options)
    return target


def test_layers_that_share_their_inputs_are_corrected_one_by_one() -> None:
    x, seen = streams(200, 9)
    weights = [torch.randn(n, 9, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 3)]
    found = compute_asymmetric_targets(weights, *moments(x, seen))
    for W, target in zip(weights, found, strict=True):
        torch.testing.assert_close(target, compute_asymmetric_target(W, *moments(x, seen)))


@pytest.mark.parametrize(("out", "features"), [(3, 5), (1, 1), (7, 12)])
def test_a_full_correction_is_least_squares(out: int, features: int) -> None:
    x, seen = streams(400, features)
    W = torch.randn(out, features, generator=torch.Generator().manual_seed(out))
    found = compute_asymmetric_target(W, *moments(x, seen), strength=1.0, damping=1e-7)
    expected, *_ = np.linalg.lstsq(seen.double().numpy(), (x @ W.T).double().numpy(), rcond=None)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=2e-3, atol=2e-3)


def test_half_a_correction_lies_half_way_and_damping_holds_it_back() -> None:
    x, seen = streams(300, 6)
    W, (H, C) = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), moments(x, seen)
    full, half = (compute_asymmetric_target(W, H, C, strength=a) for a in (1.0, 0.5))
    torch.testing.assert_close(half, (W + full) / 2)
    held = compute_asymmetric_target(W, H, C, strength=1.0, damping=100.0)
    assert float((held - W).norm()) < 0.05 * float((full - W).norm())


def test_equal_streams_and_dead_inputs_change_nothing() -> None:
    x, seen = streams(300, 8, dead=(2, 5))
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compute_asymmetric_target(W, *moments(x, x)), W)
    found = compute_asymmetric_target(W, *moments(x, seen))
    torch.testing.assert_close(found[:, [2, 5]], W[:, [2, 5]])
    assert not torch.allclose(found[:, 0], W[:, 0])


def test_a_moment_that_cannot_be_factored_leaves_the_weight() -> None:
    W, broken = torch.ones(2, 3), torch.full((3, 3), float("nan"))
    assert torch.equal(compute_asymmetric_target(W, broken, broken), W)
