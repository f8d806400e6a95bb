"""`uniform`: the largest single candidate that fits, for every unit that can have it.

What the runtime does not take stays dense (and was said). Nothing is mixed to fill the rest of the
budget; how much of it stays is said.
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
        plan = _for_all(problem, candidate)
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
    return Solution(choices=_for_all(problem, best), notes=(note,) if left else ())


def _for_all(problem: Problem, candidate: Candidate) -> dict[str, Candidate]:
    """A candidate for every unit that can have it; the largest one for the others."""
    return {
        unit: candidate if candidate in sizes else max(sizes, key=lambda c: (sizes[c], c))
        for unit, sizes in problem.ledger.bytes_of.items()
    }
