"""Magnitude masks against sorting in Python."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.masks import build_magnitude_mask, compute_relative_error, prune_by_magnitude


def naive(W: torch.Tensor, count: int) -> list[bool]:
    values = W.flatten().abs().tolist()
    dropped = set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
    return [i not in dropped for i in range(len(values))]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 16), (5, 33)])
@pytest.mark.parametrize(("sparsity", "of"), [(0.0, 0), (0.3, 3), (0.5, 5), (0.9, 9), (1.0, 10)])
def test_the_smallest_are_dropped(shape: tuple[int, int], sparsity: float, of: int) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    count = W.numel() * of // 10
    assert build_magnitude_mask(W, sparsity).flatten().tolist() == naive(W, count)


def test_ties_go_by_position_and_the_count_is_exact() -> None:
    W = torch.tensor([[1.0, -1.0, 2.0], [1.0, 0.0, -1.0]])
    mask = build_magnitude_mask(W, 0.5)
    assert mask.tolist() == [[False, False, True], [True, False, True]]


def test_pruning_leaves_the_original_alone() -> None:
    W = torch.tensor([[3.0, -0.1]])
    assert prune_by_magnitude(W, 0.5).tolist() == [[3.0, 0.0]]
    assert W.tolist() == [[3.0, pytest.approx(-0.1)]]


@pytest.mark.parametrize("sparsity", [-0.1, 1.01])
def test_shares_outside_the_unit_interval_are_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        build_magnitude_mask(torch.ones(2, 2), sparsity)


def test_relative_error_is_that_of_the_matrices_put_together() -> None:
    W, V = torch.randn(3, 4), torch.randn(5, 4)
    dW, dV = 0.1 * torch.randn(3, 4), 0.3 * torch.randn(5, 4)
    whole = torch.cat([dW, dV]).square().sum() / torch.cat([W, V]).square().sum()
    assert compute_relative_error((dW, dV), (W, V)) == pytest.approx(float(whole), rel=1e-5)
    assert compute_relative_error((torch.zeros(2, 2),), (torch.zeros(2, 2),)) == 0.0
