"""Second moments and their factors against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.numerics.hessian import (
    MOST_DAMPING,
    SecondMoment,
    add_damping,
    factor_damped_inverse,
    factor_inverse,
    find_dead_inputs,
)

SIZES = [1, 2, 7, 33, 130]


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated rows, (tokens, in) float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing_II


def moment(features: int) -> Tensor:
    X_TI = inputs(3 * features + 5, features)
    return X_TI.T @ X_TI / len(X_TI)


def indefinite(features: int, lowest: float) -> Tensor:
    """Mean diagonal 1, one eigenvalue `lowest`, the others equal."""
    generator = torch.Generator().manual_seed(features)
    random_II = torch.randn(features, features, generator=generator, dtype=torch.float64)
    Q_II, _ = torch.linalg.qr(random_II)
    values_I = torch.full((features,), (features - lowest) / (features - 1), dtype=torch.float64)
    values_I[0] = lowest
    return Q_II @ torch.diag(values_I) @ Q_II.T


@pytest.mark.parametrize("features", SIZES)
def test_the_mean_is_that_of_all_rows_together(features: int) -> None:
    X_TI = inputs(41, features)
    found = SecondMoment(features)
    for part_TI in X_TI.float().split([1, 0, 17, 23]):
        found.add(part_TI)
    x = X_TI.numpy()
    assert found.tokens == 41
    np.testing.assert_allclose(found.mean_II.numpy(), x.T @ x / 41, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_summed_in_half_precision(dtype: torch.dtype) -> None:
    """4,000 tokens of 1,000 each: the squares overflow float16, the sum saturates bfloat16."""
    x_TI = torch.full((4000, 2), 1000.0, dtype=dtype)
    found = SecondMoment(2)
    found.add(x_TI)
    np.testing.assert_allclose(found.mean_II.numpy(), 1e6, rtol=1e-3)


def test_no_rows_are_zeros() -> None:
    found = SecondMoment(3)
    found.add(torch.empty(0, 3))
    assert found.tokens == 0
    assert found.mean_II.tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("features", SIZES)
def test_the_factor_is_the_cholesky_factor_of_the_inverse(features: int) -> None:
    H_II = moment(features)
    U_II = factor_inverse(H_II)
    assert U_II is not None
    expected = np.linalg.cholesky(np.linalg.inv(H_II.numpy())).T
    np.testing.assert_allclose(U_II.numpy(), expected, rtol=1e-6, atol=1e-9 * expected.max())
    assert torch.equal(U_II, U_II.triu())


def test_the_diagonal_is_what_a_column_costs_once_those_after_it_may_move() -> None:
    """1 / U_jj^2 is the least of d H d over d with d_j = 1 and zeros before."""
    H_II = moment(9)
    U_II = factor_inverse(H_II)
    assert U_II is not None
    for j in range(9):
        cost = float(H_II[j, j])
        if j < 8:
            after_I = torch.linalg.solve(H_II[j + 1 :, j + 1 :], H_II[j + 1 :, j])
            cost -= float(H_II[j, j + 1 :] @ after_I)
        assert float(U_II[j, j] ** -2) == pytest.approx(cost, rel=1e-8)


@pytest.mark.parametrize(
    "H_II",
    [
        torch.zeros(3, 3),
        -torch.eye(3),
        torch.ones(3, 3).double(),
        torch.full((3, 3), float("nan")),
        torch.eye(3) * float("inf"),
        indefinite(5, -0.001),
    ],
    ids=["zeros", "negative", "singular", "nan", "infinite", "indefinite"],
)
def test_what_is_not_positive_definite_has_no_factor(H_II: Tensor) -> None:
    assert factor_inverse(H_II) is None


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    H_II = moment(6)
    before_II = H_II.clone()
    expected = H_II.numpy() + 0.25 * np.trace(H_II.numpy()) / 6 * np.eye(6)
    np.testing.assert_allclose(add_damping(H_II, 0.25).numpy(), expected, rtol=1e-12)
    assert torch.equal(H_II, before_II)
    assert torch.equal(add_damping(H_II, 0.0), H_II)


def test_dead_inputs_are_inert() -> None:
    X_TI = inputs(50, 6)
    X_TI[:, [1, 4]] = 0
    H_II = X_TI.T @ X_TI / 50
    assert find_dead_inputs(H_II).tolist() == [False, True, False, False, True, False]
    U_II = factor_inverse(add_damping(H_II, 0.01))
    assert U_II is not None
    off_II = U_II - torch.diag(U_II.diagonal())
    assert not bool(off_II[[1, 4]].any())
    assert not bool(off_II[:, [1, 4]].any())
    assert bool((add_damping(H_II, 0.01).diagonal() > 0).all())
    assert factor_inverse(H_II) is None
    assert factor_inverse(add_damping(H_II, 0.0)) is not None


def test_the_least_damping_that_works_is_used() -> None:
    """The lowest eigenvalue, in shares of the mean diagonal, must be outweighed."""
    for lowest, expected in ((0.5, 0.01), (-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)):
        H_II = indefinite(8, lowest)
        U_II, used = factor_damped_inverse(H_II, 0.01)
        assert used == pytest.approx(expected)
        assert U_II is not None
        inverse = np.linalg.inv(add_damping(H_II, used).numpy())
        np.testing.assert_allclose((U_II.T @ U_II).numpy(), inverse, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "H_II",
    [indefinite(8, -1.5), -torch.eye(3), torch.full((3, 3), float("nan"))],
    ids=["indefinite", "negative", "nan"],
)
def test_what_no_damping_helps_is_given_up(H_II: Tensor) -> None:
    U_II, used = factor_damped_inverse(H_II, 0.01)
    assert U_II is None
    assert used > MOST_DAMPING
