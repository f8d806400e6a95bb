"""The mask chosen inside the sweep against the one by the book."""

from __future__ import annotations

import pytest
import torch

from cptq.numerics.hessian import factor_inverse
from cptq.numerics.masks import build_n_of_m_mask, count_dropped
from cptq.numerics.sweep import sweep_columns
from cptq.numerics.sweep_mask import SweepMask
from tests.reference import sparsity as truth
from tests.unit.numerics.test_sweep import problem


@pytest.mark.parametrize(
    ("out", "inputs", "share", "kept_of"),
    [
        (3, 7, 0.3, None),
        (2, 150, 0.37, None),
        (3, 36, 0.5, (2, 4)),
        (2, 40, 0.5, (4, 8)),
        (3, 39, 1 / 3, (2, 3)),
    ],
)
def test_equals_sparsegpt_by_the_book(
    out: int, inputs: int, share: float, kept_of: tuple[int, int] | None
) -> None:
    W_OI, H_II = problem(out, inputs)
    U_II = factor_inverse(H_II)
    assert U_II is not None
    drop = count_dropped(share, W_OI.numel())
    mask = SweepMask((inputs, out), U_II.diagonal().reciprocal().square(), drop, kept_of)

    def project(position: int, column_O: torch.Tensor) -> torch.Tensor:
        return column_O * mask.mask_IO[position]

    Q_IO, _ = sweep_columns(W_OI.T.contiguous(), U_II, project, mask=mask)
    expected_OI, kept = truth.sparsegpt(W_OI, H_II, share, kept_of)
    assert mask.mask_IO.T.tolist() == kept
    torch.testing.assert_close(Q_IO.T, expected_OI, rtol=0, atol=1e-8)
    assert int((~mask.mask_IO).sum()) == drop


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 3)])
def test_n_of_m_keeps_the_largest(kept: int, of: int) -> None:
    score_OI = torch.randn(3, 6 * of, generator=torch.Generator().manual_seed(of))
    score_OI[0] = 1.0  # ties: the first stay
    mask_OI = build_n_of_m_mask(score_OI, kept, of)
    for row, stays in zip(score_OI.abs().tolist(), mask_OI.tolist(), strict=True):
        for start in range(0, len(row), of):
            run = range(start, start + of)
            best = sorted(run, key=lambda j: (-row[j], j))[:kept]
            assert [stays[j] for j in run] == [j in best for j in run]
