"""PQ Index, Gini, outliers and contributions against loops."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.contributions import Contributions, count_small
from cptq.numerics.inequality import (
    bound_prunable,
    compute_gini,
    compute_pq_index,
    count_outliers,
)
from tests.reference import sparsity as truth


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33)])
def test_equal_the_definitions(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    values = W.double().flatten().tolist()
    assert compute_pq_index(W) == pytest.approx(truth.pq_index(values, 0.5, 1.0), abs=1e-6)
    assert compute_gini(W) == pytest.approx(truth.gini(values), abs=1e-9)
    sizes = [abs(v) for v in values]
    expected = truth.outlier_ratio(sizes, 1.5) * len(sizes)
    assert count_outliers(W, 1.5) == pytest.approx(expected)
    equal, one = torch.full((3, 4), -2.0), torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    for W, expected in ((equal, 0.0), (one, 0.75)):
        assert compute_pq_index(W) == pytest.approx(expected, abs=1e-12)
        assert compute_gini(W) == pytest.approx(expected, abs=1e-12)
    assert compute_pq_index(torch.zeros(2, 2)) == compute_gini(torch.zeros(2, 2)) == 0


def test_the_bound_is_met_by_what_it_bounds() -> None:
    """Of r equal weights among d, r must stay: the bound is tight there; eta lets more go."""
    W = torch.cat([torch.ones(12), torch.zeros(20)])
    assert bound_prunable(compute_pq_index(W)) == pytest.approx(20 / 32)
    assert bound_prunable(0.5, eta=1.0) == pytest.approx(1 - 0.5 / 4)


@pytest.mark.parametrize(("tokens", "features", "out"), [(1, 3, 2), (5, 17, 4), (7, 33, 9)])
def test_cett_and_its_threshold(tokens: int, features: int, out: int) -> None:
    generator = torch.Generator().manual_seed(features)
    a_TF = torch.randn(tokens, features, generator=generator).relu() + 0.01
    W_OF = torch.randn(out, features, generator=generator)
    layer = Contributions(a_TF, W_OF)
    for threshold in (0.0, 0.3, 1.0):
        expected = truth.cett(a_TF, W_OF, threshold)
        assert layer.measure_error(threshold) == pytest.approx(expected, abs=1e-5)
    at = layer.find_threshold(0.2)
    assert layer.measure_error(at) <= 0.2
    sizes = sorted({float(v) for v in (a_TF.abs() * W_OF.norm(dim=0)).flatten()})
    beyond = next((v for v in sizes if v >= at), None)
    if beyond is not None:  # one part more would lose too much
        assert layer.measure_error(beyond * 1.0001) > 0.2


def test_zeros_and_near_zeros_are_counted_by_token() -> None:
    a_TF = torch.tensor([[0.0, 1.0, -100.0], [0.0, 0.5, 1.0]])
    assert count_small(a_TF, 0.01) == (2, 3)
