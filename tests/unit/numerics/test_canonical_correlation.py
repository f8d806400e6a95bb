"""Canonical correlation against the generalised eigenproblem, and its traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.numerics.canonical_correlation import (
    SUMMARIES,
    compute_canonical_correlations,
    compute_pairwise_similarities,
    compute_principal_basis,
    compute_similarity,
    count_tokens_needed,
    standardize,
)
from tests.reference import sensitivity as truth


def views(tokens: int, features: int, others: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views that share three noisy directions, with means far from 0."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 3, generator=draw, dtype=torch.float64)
    made = []
    for width in (features, others):
        mix = torch.randn(3, width, generator=draw, dtype=torch.float64)
        noise = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
        made.append(shared @ mix + noise + 5.0)
    return made[0], made[1]


def full(X: Tensor) -> Tensor:
    return compute_principal_basis(X, components=1000, energy=1.0, ridge=0.0)


@pytest.mark.parametrize(("features", "others"), [(5, 5), (7, 4), (4, 9), (1, 3)])
def test_correlations_equal_the_eigenproblem(features: int, others: int) -> None:
    X, Y = views(203, features, others)
    rho = compute_canonical_correlations(full(X), full(Y)).numpy()
    np.testing.assert_allclose(rho, truth.canonical_correlations(X, Y), atol=1e-8)


@pytest.mark.parametrize(("features", "others"), [(5, 5), (7, 4), (4, 9)])
def test_pwcca_equals_its_definition(features: int, others: int) -> None:
    X, Y = views(203, features, others)
    ours = compute_similarity(X, full(X), full(Y), summary="pwcca")
    assert ours == pytest.approx(truth.projection_weighted(X, Y), abs=1e-8)


def test_the_other_summaries() -> None:
    X, Y = views(150, 6, 5)
    rho = truth.canonical_correlations(X, Y)
    assert compute_similarity(X, full(X), full(Y), summary="svcca") == pytest.approx(rho.mean())
    assert compute_similarity(X, full(X), full(Y), summary="first") == pytest.approx(rho[0])


def test_wide_views_give_the_same_subspace_as_tall_ones() -> None:
    X, _ = views(40, 60, 1)
    wide = compute_principal_basis(X, components=8, ridge=0.0)
    U = torch.linalg.svd(X - X.mean(0), full_matrices=False).U[:, :8]
    assert torch.allclose(wide @ wide.T, U @ U.T, atol=1e-9)


def test_energy_and_components_cut() -> None:
    draw = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(100, 4, generator=draw, dtype=torch.float64)).Q
    X = Q - Q.mean(0)
    X = torch.linalg.qr(X).Q * torch.tensor([10.0, 1.0, 0.5, 0.01], dtype=torch.float64)
    assert compute_principal_basis(X, energy=0.98).shape[1] == 1
    assert compute_principal_basis(X, energy=0.99).shape[1] == 2
    assert compute_principal_basis(X, energy=1.0, components=3).shape[1] == 3


def test_invariance_to_scale_and_rotation() -> None:
    X, Y = views(120, 5, 6)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    before = compute_similarity(X, full(X), full(Y))
    assert compute_similarity(X, full(X), full(3.0 * Y @ turn - 2.0)) == pytest.approx(
        before, abs=1e-9
    )


def test_the_ridge_discounts_directions_of_no_variance() -> None:
    X, _ = views(300, 4, 1)
    tiny = torch.cat([X[:, :3], X[:, 3:] * 1e-5], dim=1)
    Q = compute_principal_basis(tiny, energy=1.0, ridge=1e-6)
    assert Q.shape[1] == 4
    assert float(Q[:, -1].norm()) < 0.05
    assert float(Q[:, 0].norm()) == pytest.approx(1.0, abs=1e-3)


def test_too_few_tokens_correlate_by_construction_and_enough_do_not() -> None:
    draw = torch.Generator().manual_seed(2)
    X, Y = torch.randn(12, 20, generator=draw), torch.randn(12, 20, generator=draw)
    assert compute_similarity(X, full(X), full(Y), summary="svcca") == pytest.approx(1.0)
    X, Y = torch.randn(4000, 20, generator=draw), torch.randn(4000, 20, generator=draw)
    assert compute_similarity(X, full(X), full(Y), summary="svcca") < 0.1
    assert count_tokens_needed(576) == 160
    assert count_tokens_needed(7) == 70


def test_constant_views_have_nothing_to_lose() -> None:
    X, Y = torch.ones(50, 3), torch.randn(50, 3)
    assert compute_principal_basis(X).shape == (50, 0)
    assert compute_similarity(X, compute_principal_basis(X), compute_principal_basis(Y)) == 1.0


def test_pairs_are_what_two_views_give_alone() -> None:
    X = [views(200, 5, seed)[0] for seed in range(3)]
    X[1] = torch.cat([X[0][:, :3], X[1]], dim=1)
    pairs = compute_pairwise_similarities(X)
    X = [standardize(x) for x in X]
    bases = [compute_principal_basis(x) for x in X]
    for i in range(3):
        for j in range(3):
            for summary in SUMMARIES:
                expected = (
                    compute_similarity(X[i], bases[i], bases[j], summary=summary) if i != j else 1.0
                )
                assert float(pairs[summary][i, j]) == pytest.approx(expected, abs=1e-9)


def test_standardized_features_have_mean_0_and_variance_1() -> None:
    draw = torch.Generator().manual_seed(0)
    size, mean = torch.tensor([1.0, 9.0, 0.0, 1e-4]), torch.tensor([3.0, 0.0, 7.0, 1000.0])
    X = torch.randn(60, 4, generator=draw) * size + mean
    found = standardize(X)
    assert found.shape == (60, 2)  # of the last two one is constant, the other but for rounding
    assert torch.allclose(found.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.square().mean(0), torch.ones(2, dtype=torch.float64))
    restored = found[:, 0] * X[:, 0].std(unbiased=False) + X[:, 0].mean()
    assert torch.allclose(restored, X[:, 0].double(), atol=1e-5)
