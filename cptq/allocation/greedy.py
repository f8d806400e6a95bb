"""`greedy`: from the smallest plan, always the step of largest score decrease per byte.

Within one step of the optimum of the relaxed problem, and fast; the honest baseline of `knapsack`.
"""

from __future__ import annotations

from cptq.allocation.climb import climb
from cptq.allocation.problem import Problem, Solution
from cptq.types import Emit


def greedy(problem: Problem, emit: Emit) -> Solution:
    """Climb from every unit's smallest option; see `cptq.allocation.climb`."""
    return Solution(choices=problem.candidates_of(climb(problem, problem.smallest())))
