"""The blocked sweep equals the naive one that re-inverts at every column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics.hessian import factor_inverse
from cptq.numerics.sweep import sweep_columns
from tests.reference.sweep import naive_sweep

SHAPES = [(5, 7), (3, 33), (8, 65), (1, 40), (6, 1)]


def problem(out: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X_TI = torch.randn(4 * features + 3, features, generator=generator, dtype=torch.float64)
    mixing_II = torch.randn(features, features, generator=generator, dtype=torch.float64)
    X_TI = X_TI @ mixing_II  # correlated inputs, so that compensation matters
    W_OI = torch.randn(out, features, generator=generator, dtype=torch.float64)
    return W_OI, X_TI.T @ X_TI / len(X_TI)


def to_grid(_position: int, column_O: Tensor) -> Tensor:
    return (column_O / 0.37).round().clamp(-4, 3) * 0.37


def to_mask(position: int, column_O: Tensor) -> Tensor:
    return column_O * (column_O.abs() > 0.5 + 0.01 * position)


@pytest.mark.parametrize(("out", "features"), SHAPES)
@pytest.mark.parametrize("block", [1, 3, 32, 50, 128])
@pytest.mark.parametrize("project", [to_grid, to_mask])
def test_equals_naive_for_any_block(out: int, features: int, block: int, project) -> None:
    W_OI, H_II = problem(out, features)
    U_II = factor_inverse(H_II)
    assert U_II is not None
    Q_IO, loss_O = sweep_columns(W_OI.T.clone(), U_II, project, block=block)
    naive_OI, naive_loss_O = naive_sweep(W_OI, H_II, project)
    torch.testing.assert_close(Q_IO.T, naive_OI, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss_O, naive_loss_O, rtol=1e-9, atol=1e-10)


def test_loss_is_the_output_error() -> None:
    W_OI, H_II = problem(4, 19)
    Q_IO, loss_O = sweep_columns(W_OI.T.clone(), factor_inverse(H_II), to_grid)
    D_OI = W_OI - Q_IO.T
    torch.testing.assert_close(loss_O, ((D_OI @ H_II) * D_OI).sum(1), rtol=1e-9, atol=1e-12)


def test_beats_rounding_where_inputs_correlate() -> None:
    W_OI, H_II = problem(16, 33)
    _, loss_O = sweep_columns(W_OI.T.clone(), factor_inverse(H_II), to_grid)
    D_OI = W_OI - to_grid(0, W_OI)
    assert loss_O.sum() < 0.8 * ((D_OI @ H_II) * D_OI).sum()


def test_identity_projection_changes_nothing() -> None:
    W_OI, H_II = problem(3, 21)
    Q_IO, loss_O = sweep_columns(W_OI.T.clone(), factor_inverse(H_II), lambda _j, w: w)
    assert torch.equal(Q_IO.T, W_OI)
    assert loss_O.abs().max() == 0
