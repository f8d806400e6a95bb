"""The Cholesky factor in panels against the textbook's, on any size and with any threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cptq.numerics.cholesky import PANEL, WIDE, factor_in_place, invert_in_place


def make_moment(size: int, seed: int = 0) -> Tensor:
    x = torch.randn(2 * size + 3, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x) + 0.01 * torch.eye(size)


def factor_by_the_book(A: np.ndarray) -> np.ndarray:
    """Column by column, in float64 (Golub & Van Loan, algorithm 4.2.1)."""
    L = np.zeros_like(A)
    for j in range(len(A)):
        L[j, j] = math.sqrt(A[j, j] - L[j, :j] @ L[j, :j])
        for i in range(j + 1, len(A)):
            L[i, j] = (A[i, j] - L[i, :j] @ L[j, :j]) / L[j, j]
    return L


@pytest.mark.parametrize("size", [1, 2, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 5])
def test_it_is_the_factor(size: int) -> None:
    A_II = make_moment(size)
    L_II = factor_in_place(A_II.clone())
    assert L_II is not None
    wanted = factor_by_the_book(A_II.double().numpy())
    np.testing.assert_allclose(L_II.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert float(L_II.triu(1).abs().max()) == 0


def test_it_is_computed_in_place_and_reads_the_lower_half_alone() -> None:
    A_II = make_moment(PANEL + 40)
    lower_II = A_II.tril() + torch.full_like(A_II, torch.nan).triu(1)
    L_II, whole_II = factor_in_place(lower_II), factor_in_place(A_II)
    assert L_II is not None
    assert whole_II is not None
    assert L_II.data_ptr() == lower_II.data_ptr()
    torch.testing.assert_close(L_II, whole_II)


def test_threads_do_not_change_a_bit() -> None:
    A_II, before = make_moment(WIDE + PANEL + 77), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            L_II = factor_in_place(A_II.clone())
            assert L_II is not None
            found += [L_II.clone(), invert_in_place(L_II)]
    finally:
        torch.set_num_threads(before)
    for place, first in enumerate(found[:2]):
        assert all(torch.equal(first, other) for other in found[place::2])


@pytest.mark.parametrize("size", [1, 7, PANEL + 1, WIDE, WIDE + 5])
def test_the_inverse_of_a_factor_is_in_its_memory(size: int) -> None:
    L_II = factor_in_place(make_moment(size))
    assert L_II is not None
    expected = np.linalg.inv(L_II.double().numpy())
    found = invert_in_place(L_II)
    assert found.data_ptr() == L_II.data_ptr()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert float(found.triu(1).abs().max()) == 0


@pytest.mark.parametrize("place", [0, PANEL // 2, PANEL + 9])
def test_a_matrix_without_a_factor_gives_none(place: int) -> None:
    A_II = make_moment(PANEL + 20)
    A_II[place, place] = -1
    assert factor_in_place(A_II) is None
    A_II[place, place] = torch.nan
    assert factor_in_place(A_II) is None
