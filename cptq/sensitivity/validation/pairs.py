"""Choose few (unit, candidate) pairs to measure that still cover all depths, roles and widths.

Units fall into cells of depth (first 30% of the blocks, middle, last 30%) x role. One seeded order
of all units takes one unit of each cell in turn, so that any run of consecutive units covers the
cells as evenly as possible. The candidates divide that order among them, each continuing where the
one before it stopped: every candidate gets the same number of pairs, no unit twice, and units
repeat between candidates only when all have been used.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from cptq.types import Candidate, Unit, count_end_blocks


def classify_depth(block: int | None, blocks: int) -> str:
    """Return "first", "middle" or "last"; "outside" for what belongs to no block."""
    if block is None:
        return "outside"
    ends = count_end_blocks(blocks)
    if block < ends:
        return "first"
    return "last" if blocks - 1 - block < ends else "middle"


def choose_pairs(
    units: Sequence[Unit], blocks: int, candidates: Sequence[Candidate], count: int, seed: int
) -> list[tuple[Unit, Candidate]]:
    """Choose about `count` pairs, as many of each candidate; all there are if `count` is more.

    Args:
        units: the compressible units.
        blocks: how many blocks the model has.
        candidates: ways to store a unit; dense ones change nothing and are left out.
        count: how many pairs in all; at least one per candidate is taken.
        seed: seed of the order.
    """
    tried = [candidate for candidate in candidates if not candidate.dense]
    dealt = interleave_units(units, blocks, seed)
    each = max(1, min(count // max(len(tried), 1), len(dealt)))
    found = []
    for index, candidate in enumerate(tried):
        start = index * each
        found += [(dealt[(start + k) % len(dealt)], candidate) for k in range(each)]
    return found


def interleave_units(units: Sequence[Unit], blocks: int, seed: int) -> list[Unit]:
    """Return all units, one of each cell in turn, cells and their units in seeded order."""
    cells: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        cells.setdefault((classify_depth(unit.block, blocks), unit.role), []).append(unit)
    draw = random.Random(seed)
    order = list(cells.values())
    draw.shuffle(order)
    for cell in order:
        draw.shuffle(cell)
    longest = max(map(len, order), default=0)
    return [cell[turn] for turn in range(longest) for cell in order if turn < len(cell)]


def rank_depths(
    rows: Sequence[tuple[str, str, Candidate, float]],
) -> Mapping[str, float]:
    """Return {depth: factor}, how far values lie above the average of their role and candidate.

    The geometric mean over a depth of value / (geometric mean over the same role and candidate).

    Args:
        rows: (depth, role, candidate, value); values of 0 or below have no logarithm and are left
            out, as are groups with values of one depth only, which compare nothing.
    """
    groups: dict[tuple[str, Candidate], list[tuple[str, float]]] = {}
    for where, role, candidate, value in rows:
        if value > 0:
            groups.setdefault((role, candidate), []).append((where, float(np.log(value))))
    found: dict[str, list[float]] = {}
    for group in groups.values():
        if len({where for where, _ in group}) > 1:
            mean = float(np.mean([log for _, log in group]))
            for where, log in group:
                found.setdefault(where, []).append(log - mean)
    return {where: float(np.exp(np.mean(logs))) for where, logs in found.items()}
