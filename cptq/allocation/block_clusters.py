"""The assignment of CPTQuant as the paper has it (arXiv 2412.03599): blocks, KMeans(3), 16/8/4.

The scores of the blocks are clustered into three groups. All units of a block in the cluster of
largest centroid get the first width (16 bits), those of the middle one the second (8), those of
the smallest the third (4). There is no budget: the bytes are an outcome, for `CostModel` to count.
So this is no entry of `ALLOCATORS`; `cluster` is the paper's idea made to keep a budget.

Departures from the released code: it maps cluster labels to widths without sorting the centroids,
so that the order is random; here they are sorted, and the clusters are the exact optimum on the
line (`cptq.allocation.kmeans`).

Fewer than three distinct scores give fewer clusters, which the paper does not provide for. Two take
the first and the last width; a single one, where no block is more sensitive than another, takes
the middle width. Equal scores never get different widths. Units outside blocks (a pooler, an
output head) have no score: they stay dense, and so does a unit for which the file format or the
runtime refuses its width. Both are in the notes.

Cost: O(blocks^2). Limits: as many widths as clusters, whatever the distance of the centroids; one
outlier takes a cluster for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cptq.allocation.cluster import CLUSTERS
from cptq.allocation.cost import CostModel
from cptq.allocation.kmeans import cluster_line
from cptq.errors import PlanError
from cptq.types import Candidate, Unit

#: one candidate per cluster, the most sensitive cluster's first
Levels = tuple[Candidate, Candidate, Candidate]
#: the paper's widths
PAPER_BITS = (16, 8, 4)
DENSE = Candidate(bits=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAssignment:
    """A candidate for every unit, by its block.

    Attributes:
        blocks: block index -> candidate.
        choices: unit name -> candidate, for every unit of the model.
        notes: what differs from "every unit has its block's candidate".
    """

    blocks: Mapping[int, Candidate]
    choices: Mapping[str, Candidate]
    notes: tuple[str, ...] = ()


def build_levels(bits: Sequence[int], group_size: int) -> Levels:
    """Return the levels of three widths; `group_size` inputs share a scale, 16 bits are dense.

    Raises:
        PlanError: the widths are not three that fall.
    """
    if len(bits) != CLUSTERS or sorted(set(bits), reverse=True) != list(bits):
        raise PlanError(
            f"the widths {', '.join(map(str, bits))} are not one per cluster, largest first",
            allowed="three widths that fall, such as 16, 8, 4",
        )
    first, second, third = (
        DENSE if width >= DENSE.bits else Candidate(bits=width, group_size=group_size)
        for width in bits
    )
    return first, second, third


def assign_levels(scores: Mapping[int, float], levels: Levels) -> dict[int, Candidate]:
    """Cluster the blocks by score and give each cluster a level.

    Args:
        scores: block index -> score, higher = more sensitive.
        levels: for the clusters by falling centroid.

    Returns:
        Block index -> candidate; empty without blocks.

    Raises:
        PlanError: a score is NaN or infinite.
    """
    for block, score in scores.items():
        if not math.isfinite(score):
            raise PlanError(f"the score of block {block} is {score}")
    labels = cluster_line(list(scores.values()), CLUSTERS)
    rising = _choose_levels(max(labels, default=0) + 1, levels)
    return {block: rising[label] for block, label in zip(scores, labels, strict=True)}


def _choose_levels(clusters: int, levels: Levels) -> tuple[Candidate, ...]:
    """Return the levels of so many clusters, for the least sensitive first."""
    most, middle, least = levels
    return {1: (middle,), 2: (least, most), 3: (least, middle, most)}[clusters]


def assign_by_blocks(
    scores: Mapping[int, float], cost: CostModel, levels: Levels
) -> BlockAssignment:
    """Give every unit the level of its block.

    Args:
        scores: block index -> score, for every block that holds a unit.
        cost: the units of the model, and what the file can hold.
        levels: as in `assign_levels`.

    Raises:
        PlanError: a block that holds a unit has no score, or a score is not finite.
    """
    blocks = assign_levels(scores, levels)
    choices: dict[str, Candidate] = {}
    outside, refused = [], []
    for unit in cost.units:
        level = _find_level(unit, blocks)
        if unit.block is None:
            outside.append(unit.name)
        elif cost.explain_refusal(unit.name, level) is not None:
            refused.append(unit.name)
            level = DENSE
        choices[unit.name] = level
    clusters = len(set(blocks.values()))
    notes = [f"{clusters} clusters instead of {CLUSTERS}"] if blocks and clusters < CLUSTERS else []
    notes += [f"outside blocks, kept dense: {', '.join(outside)}"] if outside else []
    notes += [f"refused by the format, kept dense: {', '.join(refused)}"] if refused else []
    return BlockAssignment(blocks=blocks, choices=choices, notes=tuple(notes))


def _find_level(unit: Unit, blocks: Mapping[int, Candidate]) -> Candidate:
    if unit.block is None:
        return DENSE
    if unit.block not in blocks:
        raise PlanError(f"block {unit.block}, which holds {unit.name}, has no score")
    return blocks[unit.block]
