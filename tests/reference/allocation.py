"""All plans, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, product

from cptq.types import Candidate


def all_plans(
    units: Sequence[str], candidates: Sequence[Candidate]
) -> Iterator[dict[str, Candidate]]:
    """Every way to give each unit a candidate."""
    for row in product(candidates, repeat=len(units)):
        yield dict(zip(units, row, strict=True))


def best_loss(
    scores: Mapping[str, Mapping[Candidate, float]],
    candidates: Sequence[Candidate],
    size: Callable[[Mapping[str, Candidate]], int],
    limit: int,
) -> float | None:
    """The least sum of scores of the plans whose size is within the limit; None without one."""
    losses = [
        math.fsum(scores[unit][candidate] for unit, candidate in plan.items())
        for plan in all_plans(list(scores), candidates)
        if size(plan) <= limit
    ]
    return min(losses, default=None)


def best_clusters(values: Sequence[float], clusters: int) -> float:
    """The least sum of squared distances from the means, over all contiguous clusterings."""
    ordered = sorted(values)
    best = math.inf
    for cuts in combinations(range(1, len(ordered)), clusters - 1):
        bounds = [0, *cuts, len(ordered)]
        parts = [ordered[a:b] for a, b in pairwise(bounds)]
        best = min(best, sum(spread(part) for part in parts))
    return best


def spread(values: Sequence[float]) -> float:
    """Sum of squared distances from the mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)
