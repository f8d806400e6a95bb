"""`cluster`: the paper's allocator (CPTQuant, arXiv 2412.03599), with its centroids sorted.

The units fall into three clusters by their sensitivity; the most sensitive cluster gets the most
bits. Departures: the released code maps cluster labels to 16/8/4 bits without sorting the
centroids, so the order is left to chance; here they are sorted, the clusters are the exact optimum
on the line, and the three levels are the best triple of the candidates that fits the budget. What
is left of it moves single units one level up, the most sensitive first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement

from cptq.allocation.kmeans import cluster_line
from cptq.allocation.problem import Problem, Solution
from cptq.errors import PlanError
from cptq.types import Candidate, Emit

CLUSTERS = 3


def cluster(problem: Problem, emit: Emit) -> Solution:
    """Three clusters, three levels, then single steps up.

    Raises:
        PlanError: the table lacks the candidate-free number of a unit.
    """
    if not problem.options:
        return Solution(choices={})
    sensitivity = _sensitivity(problem)
    label = cluster_line(list(sensitivity.values()), CLUSTERS)
    labels = dict(zip(sensitivity, label, strict=True))
    levels = _best_levels(problem, labels)
    if levels is None:
        note = "no levels for whole clusters fit; units were raised one by one from the smallest"
        picks = problem.smallest()
    else:
        note = _describe(levels, labels)
        picks = {unit: problem.level(unit, levels[labels[unit]]) for unit in labels}
    raised = _raise_singly(problem, picks, sensitivity)
    return Solution(choices=problem.candidates_of(raised), notes=(note,))


def _sensitivity(problem: Problem) -> dict[str, float]:
    missing = [unit for unit in problem.options if unit not in problem.per_unit]
    if missing:
        raise PlanError(
            f"the measurement has no sensitivity of {missing[0]!r}, which cluster needs",
            hint="measure this model again with cptq analyze",
        )
    return {unit: problem.per_unit[unit] for unit in problem.options}


def _best_levels(problem: Problem, labels: Mapping[str, int]) -> tuple[Candidate, ...] | None:
    """The levels, least sensitive cluster first, of the smallest loss that fit."""
    for levels in _ranked_levels(problem, labels):
        picks = {unit: problem.level(unit, levels[labels[unit]]) for unit in labels}
        if problem.fits(picks):
            return levels
    return None


def _ranked_levels(problem: Problem, labels: Mapping[str, int]) -> Iterator[tuple[Candidate, ...]]:
    """Level tuples that may fit, least loss first, among equals the larger."""
    ledger = problem.ledger
    rising = sorted(problem.candidates, key=lambda c: (ledger.total(problem.at_level(c)), c))
    groups = max(labels.values()) + 1
    loss, size = _cluster_sums(problem, labels, groups)
    ranked = []
    for levels in combinations_with_replacement(rising, groups):
        total = ledger.base + sum(size[k][c] for k, c in enumerate(levels))
        if total - ledger.slack <= ledger.limit:
            ranked.append((sum(loss[k][c] for k, c in enumerate(levels)), -total, levels))
    yield from (levels for _, _, levels in sorted(ranked))


def _cluster_sums(
    problem: Problem, labels: Mapping[str, int], groups: int
) -> tuple[list[dict[Candidate, float]], list[dict[Candidate, int]]]:
    """Loss and bytes of each cluster at each candidate."""
    loss = [dict.fromkeys(problem.candidates, 0.0) for _ in range(groups)]
    size = [dict.fromkeys(problem.candidates, 0) for _ in range(groups)]
    for unit, label in labels.items():
        for candidate in problem.candidates:
            option = problem.options[unit][problem.level(unit, candidate)]
            loss[label][candidate] += option.score
            size[label][candidate] += option.nbytes
    return loss, size


def _raise_singly(
    problem: Problem, picks: dict[str, int], sensitivity: Mapping[str, float]
) -> dict[str, int]:
    """One level up for one unit after the other, most sensitive first, until nothing fits."""
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


def _describe(levels: tuple[Candidate, ...], labels: Mapping[str, int]) -> str:
    sizes = [sum(1 for label in labels.values() if label == k) for k in range(len(levels))]
    parts = [f"{n} units at {c.label}" for n, c in zip(sizes, levels, strict=True)]
    return f"clusters, least sensitive first: {', '.join(parts)}; then single units were raised"
