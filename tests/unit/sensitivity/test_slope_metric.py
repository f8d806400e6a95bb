"""The relative rounding error that turns a slope per unit into a score per candidate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.numerics.masks import compute_relative_error
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.sensitivity.slope_metric import (
    SAMPLED_ROWS,
    SAMPLED_WEIGHTS,
    estimate_rounding_error,
    sample_rows,
)
from cptq.types import Candidate, LayerSpec

W3 = Candidate(bits=3, group_size=16)


def layer(rows: int, inputs: int, seed: int) -> tuple[Tensor, LayerSpec]:
    """Rows of very different size and tail, as trained matrices have them."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, inputs, generator=draw) * torch.rand(rows, 1, generator=draw).exp()
    W[:, 3] *= 6
    spec = LayerSpec(
        name=f"l{seed}", kind="linear", role="q", block=0,
        shape=(rows, inputs), dtype="F16",
    )  # fmt: skip
    return W, spec


def truth(weights: list[Tensor], specs: list[LayerSpec]) -> float:
    return compute_relative_error(
        [compute_rounding_error(W, s, W3) for W, s in zip(weights, specs, strict=True)], weights
    )


@pytest.mark.parametrize("sizes", [[(7, 48)], [(64, 32), (5, 32)]])
def test_few_rows_are_all_looked_at(sizes: list[tuple[int, int]]) -> None:
    weights, specs = map(list, zip(*(layer(*size, i) for i, size in enumerate(sizes)), strict=True))
    assert estimate_rounding_error(weights, specs, W3) == pytest.approx(
        truth(weights, specs), rel=1e-6
    )


def test_many_rows_are_stood_for_by_some_and_a_larger_matrix_counts_for_more() -> None:
    weights, specs = map(list, zip(layer(900, 96, 0), layer(350, 96, 1), strict=True))
    weights[1] = torch.ones_like(weights[1])  # on the grid: nothing is lost there
    expected = truth(weights, specs)
    assert estimate_rounding_error(weights, specs, W3) == pytest.approx(expected, rel=0.05)
    alone = truth(weights[:1], specs[:1])
    assert abs(expected / alone - 1) > 0.01  # the second matrix matters
    assert len(sample_rows(weights[0])) == -(-SAMPLED_WEIGHTS // 96)
    assert len(sample_rows(torch.ones(70, SAMPLED_WEIGHTS))) == SAMPLED_ROWS


def test_nothing_is_lost_of_zeros() -> None:
    W, spec = layer(70, 32, 0)
    assert estimate_rounding_error([torch.zeros_like(W)], [spec], W3) == 0.0
