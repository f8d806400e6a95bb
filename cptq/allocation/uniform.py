"""`uniform`: the largest single candidate that fits, for every unit that can have it.

Bits are not mixed to fill the rest of the budget; a note states how much is left. A unit that
cannot have the candidate (because of --pin, --min-bits, --max-bits or the runtime) gets the nearest
one that it can have.
"""

from __future__ import annotations

from cptq.allocation.problem import AllocationProblem, AllocationSolution
from cptq.errors import BudgetError
from cptq.types import Candidate, Emit


def solve_uniform(problem: AllocationProblem, emit: Emit) -> AllocationSolution:
    """Give all units the largest candidate that fits everywhere.

    Raises:
        BudgetError: not even the smallest candidate fits everywhere.
    """
    ledger = problem.ledger
    best = find_largest_level(problem)
    choices = problem.assign_all(best)
    left = ledger.limit - ledger.count_bytes(choices)
    note = f"uniform {best.label} leaves {left:,} bytes of the budget unused"
    return AllocationSolution(choices=choices, notes=(note,) if left else ())


def find_largest_level(problem: AllocationProblem) -> Candidate:
    """Return the candidate of most bytes that fits as a uniform plan.

    Raises:
        BudgetError: none fits.
    """
    ledger = problem.ledger
    sizes: dict[Candidate, int] = {}
    for candidate in problem.candidates:
        plan = problem.assign_all(candidate)
        if ledger.fits(plan, ledger.sum_bytes(plan)):
            sizes[candidate] = ledger.count_bytes(plan)
    if not sizes:
        raise BudgetError(
            f"no uniform plan fits into {ledger.budget.limit_text}",
            allowed="a larger target, or smaller --bits",
        )
    return max(sizes, key=lambda candidate: (sizes[candidate], candidate))
