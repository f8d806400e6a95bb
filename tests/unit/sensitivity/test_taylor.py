"""The diagonal Fisher against per-token autograd."""

from __future__ import annotations

import pytest
import torch

from cptq.sensitivity.taylor import compute_diagonal_fisher, compute_second_order
from tests.reference import sensitivity as truth


@pytest.mark.parametrize(("tokens", "out", "features"), [(1, 1, 1), (7, 3, 5), (20, 6, 4)])
def test_fisher_equals_the_per_token_loop(tokens: int, out: int, features: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    W, x, tail, d = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((out, features), (tokens, features), (out, 4), (tokens, 4))
    )
    y = (x @ W.T).requires_grad_()
    (g,) = torch.autograd.grad((torch.tanh(y) @ tail * d).sum(), y)
    expected = truth.per_token_fisher(W, x, tail, d)
    torch.testing.assert_close(compute_diagonal_fisher(g, x), expected)
    dW = torch.randn(W.shape, generator=draw, dtype=torch.float64)
    by_hand = sum(
        float(expected[o, i]) * float(dW[o, i]) ** 2 / 2
        for o in range(out)
        for i in range(features)
    )
    assert compute_second_order(expected, dW) == pytest.approx(by_hand)
