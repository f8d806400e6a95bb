"""`uniform`: the largest single candidate that fits, for every unit.

Nothing is mixed to fill the rest of the budget; how much of it stays is said.
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
    taken: dict[Candidate, int] = {}
    for candidate in problem.candidates:
        plan = dict.fromkeys(ledger.bytes_of, candidate)
        if ledger.fits(plan, ledger.total(plan)):
            taken[candidate] = ledger.exact(plan)
    if not taken:
        raise BudgetError(
            f"no uniform plan fits into {ledger.limit:,} bytes",
            allowed="a larger target, or smaller --bits",
        )
    best = max(taken, key=lambda candidate: (taken[candidate], candidate))
    left = ledger.limit - taken[best]
    note = (
        f"uniform {best.label} leaves {left:,} bytes of the budget; nothing is mixed to fill them"
    )
    return Solution(choices=dict.fromkeys(ledger.bytes_of, best), notes=(note,) if left else ())
