"""`cluster`: the allocator of CPTQuant (arXiv 2412.03599), with sorted centroids.

The units are clustered by sensitivity into three groups; the most sensitive cluster gets the most
bits. Departures from the released code, which maps cluster labels to 16, 8 and 4 bits without
sorting the centroids, so that the order is random: here centroids are sorted, the clusters are the
exact optimum on the line, and the three levels are the best triple of candidates that fits the
budget. What is left of the budget raises single units by one level, the most sensitive first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement

from cptq.allocation.kmeans import cluster_line
from cptq.allocation.problem import AllocationProblem, AllocationSolution
from cptq.errors import PlanError
from cptq.types import Candidate, Emit

CLUSTERS = 3


def solve_by_clusters(problem: AllocationProblem, emit: Emit) -> AllocationSolution:
    """Choose a level for each of three clusters, then raise single units.

    Raises:
        PlanError: the table lacks the sensitivity of a unit.
    """
    if not problem.options:
        return AllocationSolution(choices={})
    sensitivity = _read_sensitivity(problem)
    label = cluster_line(list(sensitivity.values()), CLUSTERS)
    labels = dict(zip(sensitivity, label, strict=True))
    levels = _find_levels(problem, labels)
    if levels is None:
        note = "no levels of whole clusters fit; single units were raised from the smallest plan"
        picks = problem.pick_smallest()
    else:
        note = _describe_clusters(levels, labels)
        picks = {unit: problem.find_level(unit, levels[labels[unit]]) for unit in labels}
    raised = _raise_singly(problem, picks, sensitivity)
    return AllocationSolution(choices=problem.to_choices(raised), notes=(note,))


def _read_sensitivity(problem: AllocationProblem) -> dict[str, float]:
    missing = [unit for unit in problem.options if unit not in problem.per_unit]
    if missing:
        raise PlanError(
            f"the measurement has no sensitivity of {missing[0]!r}, needed by cluster",
            hint="measure this model again with cptq analyze",
        )
    return {unit: problem.per_unit[unit] for unit in problem.options}


def _find_levels(
    problem: AllocationProblem, labels: Mapping[str, int]
) -> tuple[Candidate, ...] | None:
    """Return the levels of least loss that fit, for the least sensitive cluster first."""
    for levels in _rank_levels(problem, labels):
        picks = {unit: problem.find_level(unit, levels[labels[unit]]) for unit in labels}
        if problem.fits(picks):
            return levels
    return None


def _rank_levels(
    problem: AllocationProblem, labels: Mapping[str, int]
) -> Iterator[tuple[Candidate, ...]]:
    """Yield tuples of levels that may fit: least loss first, among equals the larger."""
    ledger = problem.ledger
    rising = sorted(problem.candidates, key=lambda c: (ledger.sum_bytes(problem.assign_all(c)), c))
    groups = max(labels.values()) + 1
    loss, size = _sum_clusters(problem, labels, groups)
    ranked = []
    for levels in combinations_with_replacement(rising, groups):
        total = ledger.base + sum(size[k][c] for k, c in enumerate(levels))
        if total - ledger.slack <= ledger.limit:
            ranked.append((sum(loss[k][c] for k, c in enumerate(levels)), -total, levels))
    yield from (levels for _, _, levels in sorted(ranked))


def _sum_clusters(
    problem: AllocationProblem, labels: Mapping[str, int], groups: int
) -> tuple[list[dict[Candidate, float]], list[dict[Candidate, int]]]:
    """Return the loss and the bytes of each cluster at each candidate."""
    loss = [dict.fromkeys(problem.candidates, 0.0) for _ in range(groups)]
    size = [dict.fromkeys(problem.candidates, 0) for _ in range(groups)]
    for unit, label in labels.items():
        for candidate in problem.candidates:
            option = problem.options[unit][problem.find_level(unit, candidate)]
            loss[label][candidate] += option.score
            size[label][candidate] += option.nbytes
    return loss, size


def _raise_singly(
    problem: AllocationProblem, picks: dict[str, int], sensitivity: Mapping[str, float]
) -> dict[str, int]:
    """Raise units by one level, one after the other, most sensitive first, until nothing fits."""
    ranked = sorted(sensitivity, key=lambda unit: -sensitivity[unit])
    picks, moved = dict(picks), True
    while moved:
        moved = False
        for unit in ranked:
            if picks[unit] + 1 < len(problem.options[unit]):
                trial = picks | {unit: picks[unit] + 1}
                if problem.fits(trial):
                    picks, moved = trial, True
    return picks


def _describe_clusters(levels: tuple[Candidate, ...], labels: Mapping[str, int]) -> str:
    sizes = [sum(1 for label in labels.values() if label == k) for k in range(len(levels))]
    parts = [f"{n} units at {c.label}" for n, c in zip(sizes, levels, strict=True)]
    return f"clusters, least sensitive first: {', '.join(parts)}; then single units were raised"
