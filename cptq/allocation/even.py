"""`even`: uniform at any number of bytes, blind to every score; what a plan must beat.

`uniform` leaves bytes unused where the budget lies between two widths, so a mixed plan beats it by
being larger. Here the rest is spent as well: the largest width that fits everywhere, then one step
up for single units, spread evenly over the depth of the model (van der Corput's sequence, base 2),
again and again until nothing fits. Where a width fits exactly this is `uniform`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.problem import Problem, Solution
from cptq.allocation.uniform import largest_level
from cptq.types import Emit


def even(problem: Problem, emit: Emit) -> Solution:
    """The largest uniform plan that fits, its rest spread evenly over depth.

    Raises:
        BudgetError: not even the smallest candidate fits everywhere.
    """
    picks = {u: problem.level(u, largest_level(problem)) for u in problem.options}
    first, moved = dict(picks), True
    while moved:
        moved = False
        for unit in spread(list(problem.options)):
            trial = picks | {unit: picks[unit] + 1}
            if picks[unit] + 1 < len(problem.options[unit]) and problem.fits(trial):
                picks, moved = trial, True
    raised = sum(picks[unit] != first[unit] for unit in picks)
    label = largest_level(problem).label
    note = f"{label}, and {raised} units spread evenly over depth higher" if raised else ""
    return Solution(choices=problem.candidates_of(picks), notes=(note,) if note else ())


def spread(names: Sequence[str]) -> list[str]:
    """The names so that any first few of them are spread evenly over their order."""
    width = max(1, (len(names) - 1).bit_length())
    order = sorted(range(len(names)), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
    return [names[i] for i in order]
