"""Unit and block dissimilarity."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.canonical_correlation import compute_principal_basis, compute_similarity
from cptq.sensitivity.cca import compute_block_dissimilarities, compute_dissimilarities


def test_the_same_view_is_not_dissimilar_and_noise_is() -> None:
    X = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0))
    Y = torch.randn(2000, 10, generator=torch.Generator().manual_seed(1))
    assert compute_dissimilarities(X, 2 * X + 1, components=64)["pwcca"] < 1e-4
    assert compute_dissimilarities(X, Y, components=64)["pwcca"] > 0.85


def test_a_projection_loses_what_it_projects_away() -> None:
    X = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    losses = [
        compute_dissimilarities(X[:, :kept], X[:, :8], components=kept)["svcca"] for kept in (8, 4)
    ]
    assert losses[0] < 1e-4 < losses[1]


def test_blocks_are_compared_with_all_others() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(900, 6, generator=draw)
    views = [base, base @ torch.randn(6, 6, generator=draw), torch.randn(900, 6, generator=draw)]
    plain = [(view - view.mean(0)) / view.std(0, unbiased=False) for view in views]
    bases = [compute_principal_basis(view) for view in plain]
    expected = []
    for i in range(3):
        others = [compute_similarity(plain[i], bases[i], bases[j]) for j in range(3) if j != i]
        expected.append(1 - sum(others) / 2)
    assert compute_block_dissimilarities(views)["pwcca"] == pytest.approx(expected, abs=1e-5)
    assert expected[2] > expected[0]
    assert compute_block_dissimilarities(views[:1])["pwcca"] == [0.0]


def test_one_massive_activation_does_not_hide_the_rest() -> None:
    """A feature that is a thousand times the others at one token, as language models have them."""
    draw = torch.Generator().manual_seed(3)
    X = torch.randn(640, 24, generator=draw)
    Y = torch.randn(640, 24, generator=draw)
    before = compute_dissimilarities(X, Y, components=16)["pwcca"]
    massive = torch.zeros(640, 24)
    massive[5, 3] = 1e4
    after = compute_dissimilarities(X + massive, Y + massive, components=16)["pwcca"]
    assert before > 0.8
    assert after == pytest.approx(before, abs=0.1)
