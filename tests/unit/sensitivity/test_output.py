"""Output error, feedback of the sweep and its optimism, against loops and simulation."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.hessian import add_damping, factor_inverse
from cptq.sensitivity.output import (
    DAMPING,
    compute_feedback,
    compute_optimism,
    compute_ridge,
    compute_weighted_output_error,
    count_effective_inputs,
)
from tests.reference import sensitivity as truth


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=draw, dtype=torch.float64)
    return torch.randn(tokens, features, generator=draw, dtype=torch.float64) @ mix


def test_weighted_error_equals_the_loop() -> None:
    g, dy = correlated(6, 5), correlated(6, 5, seed=1)
    expected = sum(
        float(g[t, k]) ** 2 * float(dy[t, k]) ** 2 / 2 for t in range(6) for k in range(5)
    )
    assert compute_weighted_output_error(g, dy) == pytest.approx(expected)


@pytest.mark.parametrize("features", [1, 2, 9, 17])
def test_feedback_is_that_of_the_sweep(features: int) -> None:
    """W - Q = R M for the naive sweep in the same column order."""
    X = correlated(200, features)
    H = X.T @ X / 200
    order = H.diagonal().argsort(descending=True, stable=True)
    W = torch.randn(4, features, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Q, R = truth.swept(W[:, order], add_damping(H[order][:, order], DAMPING), step=0.25)
    back = order.argsort()
    found = compute_feedback(H)
    assert found is not None
    torch.testing.assert_close(W - Q[:, back], R[:, back] @ found[0], atol=1e-9, rtol=1e-7)


def test_degrees_of_freedom_equal_the_traces() -> None:
    X = correlated(100, 12)
    H = X.T @ X / 100
    U = factor_inverse(add_damping(H, 0.05))
    assert U is not None
    expected = torch.tensor(truth.ridge_degrees(H, compute_ridge(H, 0.05)), dtype=torch.float64)
    torch.testing.assert_close(
        count_effective_inputs(U, compute_ridge(H, 0.05)), expected, atol=1e-8, rtol=0
    )


def test_optimism_predicts_the_error_on_new_tokens() -> None:
    features, tokens = 48, 120
    in_sample, fresh, factor = torch.zeros(3, features, dtype=torch.float64)
    for seed in range(30):
        X = correlated(tokens, features, seed)
        new = correlated(5000, features, seed)[tokens:]  # same mixing matrix, other tokens
        found = compute_feedback(X.T @ X / tokens)
        assert found is not None
        M, df = found
        in_sample += (X @ M.T).square().mean(0)
        fresh += (new @ M.T).square().mean(0)
        factor += compute_optimism(df, tokens, tokens) / 30
    ratio = (in_sample * factor / fresh).log().mean().exp()
    # a little above 1: the part of the residual that damping leaves is not optimistic
    assert float(ratio) == pytest.approx(1.0, abs=0.2)
    assert float((in_sample / fresh).log().mean().exp()) < 0.75


def test_expected_error_is_what_the_sweep_leaves() -> None:
    """1/2 sum F r^2 with F from z = M x agrees with the swept output error on many rows."""
    X = correlated(4000, 20)
    H = X.T @ X / len(X)
    found = compute_feedback(H)
    assert found is not None
    order = H.diagonal().argsort(descending=True, stable=True)
    W = torch.randn(300, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 0.2
    Q, _ = truth.swept(W[:, order], add_damping(H[order][:, order], DAMPING), step)
    swept = float((X @ (W - Q[:, order.argsort()]).T).square().mean())
    nearest = W - (W / step).round() * step
    z = X @ found[0].T
    expected = float((nearest.square() @ z.square().mean(0)).mean())
    plain = float((X @ nearest.T).square().mean())
    assert expected == pytest.approx(swept, rel=0.1)
    assert swept < 0.7 * plain


def test_dead_inputs_neither_break_nor_compensate() -> None:
    X = correlated(200, 6)
    X[:, 2] = 0.0
    found = compute_feedback(X.T @ X / 200)
    assert found is not None
    M, df = found
    off = M - torch.diag(M.diagonal())
    assert float(off[2].abs().max()) == 0.0
    assert float(off[:, 2].abs().max()) == 0.0
    assert bool(torch.isfinite(df).all())


def test_a_hopeless_second_moment_is_given_up() -> None:
    assert compute_feedback(torch.full((3, 3), float("nan"))) is None
