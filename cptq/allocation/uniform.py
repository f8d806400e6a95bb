"""`uniform`: the largest single candidate that fits, for every unit that can have it.

Nothing is mixed to fill the rest of the budget; how much of it stays is said. A unit that may not
have the candidate (a pin, a least or largest number of bits, a runtime that does not take it) gets
the nearest that it may.
"""

from __future__ import annotations

from cptq.allocation.problem import Problem, Solution
from cptq.errors import BudgetError
from cptq.types import Candidate, Emit


def uniform(problem: Problem, emit: Emit) -> Solution:
    """One candidate for all.

    Raises:
        BudgetError: not even the smallest candidate fits everywhere.
    """
    ledger = problem.ledger
    best = largest_level(problem)
    choices = problem.at_level(best)
    left = ledger.limit - ledger.exact(choices)
    note = (
        f"uniform {best.label} leaves {left:,} bytes of the budget; nothing is mixed to fill them"
    )
    return Solution(choices=choices, notes=(note,) if left else ())


def largest_level(problem: Problem) -> Candidate:
    """The candidate of most bytes that fits when every unit gets it, or the nearest it may have.

    Raises:
        BudgetError: none fits.
    """
    ledger = problem.ledger
    taken: dict[Candidate, int] = {}
    for candidate in problem.candidates:
        plan = problem.at_level(candidate)
        if ledger.fits(plan, ledger.total(plan)):
            taken[candidate] = ledger.exact(plan)
    if not taken:
        raise BudgetError(
            f"no uniform plan fits into {ledger.limit:,} bytes",
            allowed="a larger target, or smaller --bits",
        )
    return max(taken, key=lambda candidate: (taken[candidate], candidate))
