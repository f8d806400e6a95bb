"""`greedy`: start from the smallest plan and take the best affordable step, until none is left.

A step raises one unit to any larger option. The step of largest score decrease per byte is taken;
among equals the cheaper, then the earlier unit. When no step is left, no unit can take even its
smallest step without exceeding the limit.

The result is within one step of the optimum of the relaxed problem, in which options may be mixed.
The allocator is fast and the baseline of `knapsack`; `knapsack` and `refine` use `raise_units` to
spend what they leave of the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from cptq.allocation.problem import AllocationProblem, AllocationSolution, Option
from cptq.types import Emit

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
#: bytes of an option that does not exist: more than any budget, and safe to add
_NEVER = np.iinfo(np.int64).max // 4


def solve_greedily(problem: AllocationProblem, emit: Emit) -> AllocationSolution:
    """Raise units from the smallest plan."""
    picks = raise_units(problem, problem.pick_smallest())
    return AllocationSolution(choices=problem.to_choices(picks))


def raise_units(problem: AllocationProblem, picks: Mapping[str, int]) -> dict[str, int]:
    """Raise single units of a plan that fits until no step fits.

    Cost: one pass over all options per step.
    """
    names = list(problem.options)
    sizes_UJ, scores_UJ = _build_tables(list(problem.options.values()))
    current_U = np.array([picks[name] for name in names], dtype=np.int64)
    total = problem.sum_bytes(picks)
    while (step := _find_step(problem, names, sizes_UJ, scores_UJ, current_U, total)) is not None:
        unit, option = step
        total += int(sizes_UJ[unit, option] - sizes_UJ[unit, current_U[unit]])
        current_U[unit] = option
    return {name: int(pick) for name, pick in zip(names, current_U, strict=True)}


def _build_tables(rows: list[tuple[Option, ...]]) -> tuple[_Ints, _Floats]:
    """Return bytes and scores as rectangles (units, options); missing options never fit."""
    width = max((len(row) for row in rows), default=0)
    sizes_UJ = np.full((len(rows), width), _NEVER, dtype=np.int64)
    scores_UJ = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        sizes_UJ[i, : len(row)] = [option.nbytes for option in row]
        scores_UJ[i, : len(row)] = [option.score for option in row]
    return sizes_UJ, scores_UJ


def _find_step(
    problem: AllocationProblem,
    names: list[str],
    sizes_UJ: _Ints,
    scores_UJ: _Floats,
    current_U: _Ints,
    total: int,
) -> tuple[int, int] | None:
    """Return the best step that keeps the limit, as (unit, option)."""
    ledger = problem.ledger
    room = ledger.limit + ledger.slack - total
    for unit, option, more in _rank_steps(sizes_UJ, scores_UJ, current_U, room):
        if total + more <= ledger.limit:
            return unit, option
        # between the limit and the limit plus slack, only the exact bytes decide
        trial = {name: int(pick) for name, pick in zip(names, current_U, strict=True)}
        trial[names[unit]] = option
        if problem.fits(trial):
            return unit, option
    return None


def _rank_steps(
    sizes_UJ: _Ints, scores_UJ: _Floats, current_U: _Ints, room: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the steps of at most `room` more bytes, best first: (unit, option, bytes)."""
    rows = np.arange(len(current_U))
    if not len(rows):
        return
    more_UJ = sizes_UJ - sizes_UJ[rows, current_U][:, None]
    units, options = np.nonzero((more_UJ > 0) & (more_UJ <= room))
    more = more_UJ[units, options]
    gain = scores_UJ[units, current_U[units]] - scores_UJ[units, options]
    # lexsort: the last key counts most
    for i in np.lexsort((options, units, more, -(gain / more))):
        yield int(units[i]), int(options[i]), int(more[i])
