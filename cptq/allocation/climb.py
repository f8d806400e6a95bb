"""Spend what is left: the best affordable step up, again and again.

A step moves one unit to any larger option. The step of largest score decrease per byte is taken;
among equals the cheaper, then the earlier unit. When the climb ends, no unit can take even its
smallest step without passing the limit: that is what "within one smallest step below" means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from cptq.allocation.problem import Option, Problem

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max // 4


def climb(problem: Problem, picks: Mapping[str, int]) -> dict[str, int]:
    """Move single units up from a plan that fits until none can move.

    Cost: one pass over all options per step.
    """
    chosen = dict(picks)
    names = list(problem.options)
    sizes_UJ, scores_UJ = _tables(list(problem.options.values()))
    current_U = np.array([chosen[name] for name in names], dtype=np.int64)
    total = problem.total(chosen)
    while (step := _first_fit(problem, names, sizes_UJ, scores_UJ, current_U, total)) is not None:
        unit, option = step
        total += int(sizes_UJ[unit, option] - sizes_UJ[unit, current_U[unit]])
        current_U[unit] = option
    return {name: int(pick) for name, pick in zip(names, current_U, strict=True)}


def _tables(rows: list[tuple[Option, ...]]) -> tuple[_Ints, _Floats]:
    """Bytes and scores as rectangles; missing options never fit."""
    width = max((len(row) for row in rows), default=0)
    sizes = np.full((len(rows), width), _NEVER, dtype=np.int64)
    scores = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        sizes[i, : len(row)] = [option.nbytes for option in row]
        scores[i, : len(row)] = [option.score for option in row]
    return sizes, scores


def _first_fit(
    problem: Problem,
    names: list[str],
    sizes_UJ: _Ints,
    scores_UJ: _Floats,
    current_U: _Ints,
    total: int,
) -> tuple[int, int] | None:
    """The best step that keeps the limit, as (unit, option)."""
    ledger = problem.ledger
    for unit, option, more in _steps(
        sizes_UJ, scores_UJ, current_U, ledger.limit + ledger.slack - total
    ):
        if total + more <= ledger.limit:
            return unit, option
        trial = {name: int(pick) for name, pick in zip(names, current_U, strict=True)}
        trial[names[unit]] = option
        if problem.fits(trial):
            return unit, option
    return None


def _steps(
    sizes_UJ: _Ints, scores_UJ: _Floats, current_U: _Ints, room: int
) -> Iterator[tuple[int, int, int]]:
    """Steps that may fit in `room` more bytes, best first: (unit, option, bytes)."""
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
