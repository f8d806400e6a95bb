"""`even`: a uniform plan that uses the whole budget, made without scores; the baseline plan.

All units get one width, the largest that fits everywhere. What is left of the budget raises single
units to their next width, one after the other, until nothing fits. The order of the units spreads
the raised ones evenly over the depth of the model: the first unit, the middle, the quarters, the
eighths, and so on (van der Corput's sequence in base 2).

`uniform` leaves bytes unused where the budget lies between two widths, so a mixed plan would beat
it merely by being larger. `even` takes the same bytes as a mixed plan, so the comparison shows
whether the scores help. Where a width fits exactly, `even` and `uniform` are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.problem import AllocationProblem, AllocationSolution
from cptq.allocation.uniform import find_largest_level
from cptq.types import Emit


def solve_even(problem: AllocationProblem, emit: Emit) -> AllocationSolution:
    """Take the largest uniform plan that fits and spread the rest evenly over depth.

    Raises:
        BudgetError: not even the smallest candidate fits everywhere.
    """
    level = find_largest_level(problem)
    first = {unit: problem.find_level(unit, level) for unit in problem.options}
    picks, moved = dict(first), True
    while moved:
        moved = False
        for unit in spread_evenly(list(problem.options)):
            trial = picks | {unit: picks[unit] + 1}
            if picks[unit] + 1 < len(problem.options[unit]) and problem.fits(trial):
                picks, moved = trial, True
    raised = sum(picks[unit] != first[unit] for unit in picks)
    note = f"{level.label}, and {raised} units spread evenly over depth with more" if raised else ""
    return AllocationSolution(choices=problem.to_choices(picks), notes=(note,) if note else ())


def spread_evenly(names: Sequence[str]) -> list[str]:
    """Order names so that the first few, however many, are spread evenly over the whole.

    The index is written in binary and its digits are reversed: 0, 4, 2, 6, 1, 5, 3, 7 for eight.
    """
    width = max(1, (len(names) - 1).bit_length())
    order = sorted(range(len(names)), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
    return [names[i] for i in order]
