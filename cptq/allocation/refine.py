"""`--refine N`: swap bits between units within the same bytes, judged on the whole model.

An allocator adds up scores of single units. Below 3 bits the errors of units interact and the sum
misleads (EvoPress, arXiv 2410.14649, section 3). So, starting from the allocator's plan: raise one
unit by a level, lower others until the bytes fit again (the "level switch" of EvoPress), spend what
is left by score, and measure the whole model. Keep the change if the measured divergence falls.

Departures from EvoPress: one child per generation instead of many on growing samples, since every
measurement costs; and of `TRIES` random swaps only the one whose predicted loss rises least is
measured, since a swap that every score disfavours rarely helps.

The result is never worse than the start: a change is kept only if the measured divergence falls,
and at the end the plan must hold on a second text (`guard`) as well. If it does not, the search
goes back to the last plan that does, if need be the start. Cost: N measurements, plus one, plus as
many as changes were kept. Free of torch: the function that measures is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cptq.allocation.greedy import raise_units
from cptq.allocation.problem import AllocationProblem
from cptq.types import Candidate, Emit, Progress

Choices = Mapping[str, Candidate]
Measure = Callable[[Choices], float]

#: random swaps per measurement; the one of least predicted loss is measured
TRIES = 12
#: most levels that other units lose for one level that a unit gains
MOST_LOWERED = 8


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The plan at the end, and its divergences on the two texts.

    `before` and `after` are those on the text that chooses, `guard_before` and `guard_after` those
    on the second text. `tried` plans were measured, `kept` of them became the current plan.
    """

    choices: dict[str, Candidate]
    before: float
    after: float
    guard_before: float
    guard_after: float
    tried: int
    kept: int


def refine(
    problem: AllocationProblem,
    start: Choices,
    *,
    measure: Measure,
    guard: Measure,
    evaluations: int,
    seed: int,
    emit: Emit,
) -> Refined:
    """Search for a better plan within the same budget.

    Args:
        problem: the units' options and the budget.
        start: an allocator's plan, which fits.
        measure: returns the divergence of a plan on the text that chooses.
        guard: returns it on the second text.
        evaluations: the most plans that are measured, beside the start.
        seed: of the random swaps.
        emit: receives progress.
    """
    draw = random.Random(seed)
    picks = problem.to_picks(start)
    kept = [(picks, measure(start))]
    seen = {_to_key(picks)}
    tried = 0
    for index in range(evaluations):
        message = f"divergence {kept[-1][1]:.4g}"
        emit(Progress(stage="refine", done=index, total=evaluations, message=message))
        child = _propose(problem, kept[-1][0], seen, draw)
        if child is None:
            break
        seen.add(_to_key(child))
        value, tried = measure(problem.to_choices(child)), tried + 1
        if value < kept[-1][1]:
            kept.append((child, value))
    emit(Progress(stage="refine", done=evaluations, total=evaluations))
    return _confirm_plan(problem, start, kept, guard, tried)


def _confirm_plan(
    problem: AllocationProblem,
    start: Choices,
    kept: list[tuple[dict[str, int], float]],
    guard: Measure,
    tried: int,
) -> Refined:
    """Return the last plan kept that is no worse than the start on the second text."""
    base = guard(start)
    for index in range(len(kept) - 1, 0, -1):
        choices = problem.to_choices(kept[index][0])
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


def _to_key(picks: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(picks.values())


def _propose(
    problem: AllocationProblem,
    picks: Mapping[str, int],
    seen: set[tuple[int, ...]],
    draw: random.Random,
) -> dict[str, int] | None:
    """Return the swap of least predicted loss that was not measured yet; None if there is none."""
    found = [swap_levels(problem, picks, draw) for _ in range(TRIES)]
    fresh = [child for child in found if child is not None and _to_key(child) not in seen]
    return min(fresh, key=problem.sum_scores) if fresh else None


def swap_levels(
    problem: AllocationProblem, picks: Mapping[str, int], draw: random.Random
) -> dict[str, int] | None:
    """Raise a random unit by a level, lower others until it fits, and spend the rest by score.

    Returns:
        The picks; None if the unit is at its largest option or the plan does not fit.
    """
    units = list(problem.options)
    risen = draw.choice(units)
    if picks[risen] + 1 >= len(problem.options[risen]):
        return None
    child = dict(picks) | {risen: picks[risen] + 1}
    for _ in range(MOST_LOWERED):
        if problem.fits(child):
            return raise_units(problem, child)
        lower = [unit for unit in units if unit != risen and child[unit] > 0]
        if not lower:
            return None
        fallen = draw.choice(lower)
        child[fallen] -= 1
    return raise_units(problem, child) if problem.fits(child) else None
