"""Sums and decompositions give the same bits with any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cptq.numerics.canonical_correlation import (
    compute_principal_basis,
    compute_similarities,
    standardize,
)
from cptq.numerics.reproducible import PART, compute_mean, compute_total, one_thread


def compare_threads(compute: Callable[[], object]) -> list[object]:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 7, 40 * PART + 11])
def test_a_total_is_the_sum_and_the_same_with_any_threads(size: int) -> None:
    X = torch.randn(size, generator=torch.Generator().manual_seed(size))
    one, *others = compare_threads(lambda: float(compute_total(X)))
    assert all(other == one for other in others)
    assert float(compute_total(X)) == pytest.approx(float(X.double().sum()), rel=1e-4, abs=1e-2)
    if size:
        assert float(compute_mean(X)) == pytest.approx(float(X.double().mean()), abs=1e-5)


def test_the_layout_of_a_tensor_does_not_matter() -> None:
    X_OI = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    assert float(compute_total(X_OI.T)) == pytest.approx(float(compute_total(X_OI)), rel=1e-4)


def test_similarities_are_the_same_with_any_threads() -> None:
    generator = torch.Generator().manual_seed(2)
    X_TF, mix = torch.randn(900, 310, generator=generator), torch.randn(310, 290)
    Y_TG = X_TF @ mix + 5 * torch.randn(900, 290, generator=generator)

    def compare() -> object:
        X, Y = standardize(X_TF), standardize(Y_TG)
        bases: list[Tensor] = [compute_principal_basis(Z) for Z in (X, Y)]
        return compute_similarities(X, *bases)

    one, *others = compare_threads(compare)
    assert all(other == one for other in others)


def fail_in_one_thread() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        raise LookupError("on purpose")


def test_threads_are_given_back_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(LookupError, match="on purpose"):
        fail_in_one_thread()
    assert torch.get_num_threads() == before
