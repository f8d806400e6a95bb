"""One tree of sums, whoever holds which part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.checkpoint.spill import Spill
from cptq.numerics.hessian import SecondMoment
from cptq.numerics.pairwise import PairwiseSum, add_in_pairs, order_parts

PARTS = 8


def test_neighbours_are_added_first_and_shares_are_subtrees() -> None:
    assert order_parts(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert order_parts(8, 1, 2) == [1, 5, 3, 7]
    assert [order_parts(8, index, 4) for index in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [order_parts(8, index, 8) for index in range(8)] == [[index] for index in range(8)]


def draw_parts(empty: tuple[int, ...] = ()) -> list[list[Tensor]]:
    """Rows of each part, of very different sizes, so that every order has other bits."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randn(PARTS, generator=generator)
    return [
        [] if part in empty else [sizes[part] * torch.randn(n, 70, generator=generator)]
        for part, n in enumerate([3, 5, 1, 9, 2, 2, 7, 4])
    ]


def add_up(parts: list[list[Tensor]], count: int, spill: Spill) -> tuple[Tensor, int]:
    """The mean of x x^T as `count` processes compute it, and the most sums that waited."""
    sums, tokens, most = [], 0, 0
    for index in range(count):
        moment, total = SecondMoment(70), PairwiseSum(spill.keep)
        for part in order_parts(PARTS, index, count):
            for rows in parts[part]:
                moment.add(rows)
            total.push(moment.take())
            most = max(most, len(total._waiting))
        found = total.take()
        sums.append(torch.zeros(70, 70) if found is None else found)
        tokens += moment.tokens
    joined = SecondMoment(70)
    joined.put(add_in_pairs(torch.stack(sums)), tokens)
    return joined.finish(), most


@pytest.mark.parametrize("empty", [(), (5, 6, 7), (0, 1, 2, 3, 4, 6, 7), tuple(range(8))])
@pytest.mark.parametrize("limit", [None, 0])
def test_any_number_of_processes_gives_the_same_bits(
    empty: tuple[int, ...], limit: int | None
) -> None:
    parts = draw_parts(empty)
    alone, most = add_up(parts, 1, Spill(limit))
    for count in (2, 4, 8):
        assert torch.equal(add_up(parts, count, Spill(limit))[0], alone)
    assert most <= 3
    rows = torch.cat([torch.zeros(0, 70), *(x for part in parts for x in part)]).double()
    expected = rows.T @ rows / max(len(rows), 1)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-5 * float(alone.max()))


def test_another_order_would_have_other_bits() -> None:
    parts = draw_parts()
    moment = SecondMoment(70)
    for part in parts:
        for rows in part:
            moment.add(rows)
    assert not torch.equal(moment.finish(), add_up(parts, 1, Spill())[0])
