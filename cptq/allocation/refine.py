"""`--refine N`: swap bits between units by what the whole model says, within the same bytes.

An allocator adds up scores of single units. Below 3 bits their errors interact and the sum
misleads (EvoPress, arXiv 2410.14649, section 3). So from its plan on: give one unit a level more,
take levels from others until the bytes fit again ("level switch" of EvoPress), spend what is left
by score, and measure the whole model; keep the change if the measured divergence falls.

Departures: one child a generation instead of many on growing samples, as every measurement is said
to cost; of `TRIES` random swaps the one whose predicted loss rises least is measured, since a swap
that every score calls absurd rarely helps.

Never worse than it began: only a fall of the measured divergence is kept, and at the end the plan
must hold on a second text as well, or the way is walked back to the last plan that does (the start,
if need be). Cost: N measurements, plus one and as many as were kept. No torch here: what measures
is passed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cptq.allocation.climb import climb
from cptq.allocation.problem import Problem
from cptq.types import Candidate, Emit, Progress

Choices = Mapping[str, Candidate]
Measure = Callable[[Choices], float]

#: random swaps of which the most plausible is measured
TRIES = 12
#: levels that others may lose for one that a unit gains
MOST_LOWERED = 8


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The plan at the end, and the measured divergences: first text, then second text."""

    choices: dict[str, Candidate]
    before: float
    after: float
    guard_before: float
    guard_after: float
    tried: int
    kept: int


def refine(
    problem: Problem,
    start: Choices,
    *,
    measure: Measure,
    guard: Measure,
    evaluations: int,
    seed: int,
    emit: Emit,
) -> Refined:
    """Search for a better plan of the same budget.

    Args:
        problem: the units' options and the budget.
        start: an allocator's plan; it fits.
        measure: the divergence of a plan on the text that chooses.
        guard: the same on a second text.
        evaluations: how many plans may be measured beside the start.
        seed: of the swaps.
        emit: takes progress.
    """
    draw = random.Random(seed)
    picks = problem.picks_of(start)
    kept = [(picks, measure(start))]
    seen = {_key(picks)}
    tried = 0
    for index in range(evaluations):
        words = f"divergence {kept[-1][1]:.4g}"
        emit(Progress(stage="refine", done=index, total=evaluations, message=words))
        child = _propose(problem, kept[-1][0], seen, draw)
        if child is None:
            break
        seen.add(_key(child))
        value, tried = measure(problem.candidates_of(child)), tried + 1
        if value < kept[-1][1]:
            kept.append((child, value))
    emit(Progress(stage="refine", done=evaluations, total=evaluations))
    return _guarded(problem, start, kept, guard, tried)


def _guarded(
    problem: Problem,
    start: Choices,
    kept: list[tuple[dict[str, int], float]],
    guard: Measure,
    tried: int,
) -> Refined:
    """The last plan on the way that is no worse than the start on the second text."""
    base = guard(start)
    for index in range(len(kept) - 1, 0, -1):
        choices = problem.candidates_of(kept[index][0])
        value = guard(choices)
        if value <= base:
            return Refined(
                choices=choices,
                before=kept[0][1],
                after=kept[index][1],
                guard_before=base,
                guard_after=value,
                tried=tried,
                kept=index,
            )
    return Refined(
        choices=dict(start),
        before=kept[0][1],
        after=kept[0][1],
        guard_before=base,
        guard_after=base,
        tried=tried,
        kept=0,
    )


def _key(picks: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(picks.values())


def _propose(
    problem: Problem, picks: Mapping[str, int], seen: set[tuple[int, ...]], draw: random.Random
) -> dict[str, int] | None:
    """The most plausible of some random swaps that have not been measured; None where none is."""
    found = [swap(problem, picks, draw) for _ in range(TRIES)]
    fresh = [child for child in found if child is not None and _key(child) not in seen]
    return min(fresh, key=problem.loss) if fresh else None


def swap(problem: Problem, picks: Mapping[str, int], draw: random.Random) -> dict[str, int] | None:
    """One unit a level up, others down until it fits, the rest spent by score; None: in vain."""
    units = list(problem.options)
    risen = draw.choice(units)
    if picks[risen] + 1 >= len(problem.options[risen]):
        return None
    child = dict(picks) | {risen: picks[risen] + 1}
    for _ in range(MOST_LOWERED):
        if problem.fits(child):
            return climb(problem, child)
        lower = [unit for unit in units if unit != risen and child[unit] > 0]
        if not lower:
            return None
        fallen = draw.choice(lower)
        child[fallen] -= 1
    return climb(problem, child) if problem.fits(child) else None
