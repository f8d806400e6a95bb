"""The paper's assignment: blocks in three clusters, a width for each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cptq.allocation.block_clusters import (
    PAPER_BITS,
    assign_by_blocks,
    assign_levels,
    build_levels,
)
from cptq.allocation.cost import CostModel
from cptq.errors import PlanError
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.types import Candidate
from tests.unit.allocation.synthetic import layer, model, unit

LEVELS = build_levels(PAPER_BITS, 64)


def widths(*scores: float) -> list[int]:
    """The bits of blocks with these scores."""
    found = assign_levels(dict(enumerate(scores)), LEVELS)
    assert list(found) == list(range(len(scores)))
    return [candidate.bits for candidate in found.values()]


def test_the_most_sensitive_cluster_has_16_bits_and_the_least_4() -> None:
    assert [level.label for level in LEVELS] == ["w16", "w8g64", "w4g64"]
    assert widths(5.0, 1.0, 9.0, 1.1, 5.2, 0.9) == [8, 4, 16, 4, 8, 4]
    assert widths(-3.0, -2.0, -1.0) == [4, 8, 16]


def test_the_order_of_the_blocks_does_not_matter() -> None:
    scores = [0.3, 7.0, 0.2, 2.9, 3.1, 6.5, 0.25]
    assert widths(*scores[::-1]) == widths(*scores)[::-1]


def test_one_outlier_takes_the_16_bits() -> None:
    assert widths(1e6, 1.0, 2.0, 1.0, 2.0) == [16, 4, 8, 4, 8]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((), []),
        ((1.0,), [8]),
        ((1.0, 1.0, 1.0, 1.0), [8, 8, 8, 8]),  # none is more sensitive than another
        ((1.0, 2.0), [4, 16]),
        ((2.0, 1.0, 2.0, 2.0), [16, 4, 16, 16]),
        ((1.0, 2.0, 3.0), [4, 8, 16]),
        ((0.0, 0.0, 0.0, 1e-300), [4, 4, 4, 16]),
    ],
)
def test_ties_and_few_blocks(scores: tuple[float, ...], expected: list[int]) -> None:
    assert widths(*scores) == expected


def test_equal_scores_never_get_different_widths() -> None:
    scores = [0.0, 0.0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3]
    found = dict(zip(scores, widths(*scores), strict=True))
    assert [found[score] for score in scores] == widths(*scores)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(PlanError, match="block 1"):
        widths(1.0, score)


@pytest.mark.parametrize("bits", [(16, 8), (4, 8, 16), (8, 8, 4), (16, 8, 4, 2)])
def test_widths_are_three_that_fall(bits: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="one per cluster"):
        build_levels(bits, 64)


def test_every_unit_has_the_width_of_its_block() -> None:
    cost = model(6)
    found = assign_by_blocks({b: float(b // 2) for b in range(6)}, cost, LEVELS)
    assert [found.choices[unit.name].bits for unit in cost.units] == [4, 4, 8, 8, 16, 16]
    assert [level.bits for level in found.blocks.values()] == [4, 4, 8, 8, 16, 16]
    assert found.notes == ()
    assert cost.file_bytes({}) > cost.file_bytes(found.choices)  # everything in the file counts
    assert cost.file_bytes(found.choices) > cost.count_uniform_bytes(LEVELS[2])


def test_a_unit_outside_blocks_stays_dense_and_is_named() -> None:
    cost = model(3)
    pooler = unit("pooler", replace(layer("pooler.dense", (48, 48)), block=None))
    tensors = [*cost.tensors, replace(cost.tensors[0], name="pooler.dense.weight", shape=(48, 48))]
    found = assign_by_blocks(
        {0: 1.0, 1: 2.0, 2: 2.0}, CostModel([*cost.units, pooler], tensors), LEVELS
    )
    assert found.choices["pooler"] == Candidate(bits=16)
    assert found.notes == (
        "2 clusters instead of 3",
        "outside blocks, kept dense: pooler",
    )


def test_a_unit_that_the_format_refuses_stays_dense_and_is_named() -> None:
    cost = model(3)
    asymmetric = tuple(replace(level, symmetric=False) for level in LEVELS[1:])
    found = assign_by_blocks({0: 1.0, 1: 2.0, 2: 3.0}, cost, (LEVELS[0], *asymmetric))
    assert PACK_QUANTIZED.explain_refusal(cost.units[0].layers[0], asymmetric[0])
    assert {choice.bits for choice in found.choices.values()} == {16}
    names = ", ".join(unit.name for unit in cost.units[:2])
    assert found.notes == (f"refused by the format, kept dense: {names}",)


def test_a_block_without_a_score_is_refused() -> None:
    with pytest.raises(PlanError, match="block 2, which holds"):
        assign_by_blocks({0: 1.0, 1: 2.0}, model(3), LEVELS)
