"""`knapsack`: the plan of smallest summed score within the budget, exactly.

A multiple-choice knapsack: one option of every unit, least sum of scores, bytes within the limit.
Solved as Pisinger does ("A minimal algorithm for the multiple-choice knapsack problem", EJOR 83,
1995), in two parts:

1. A price per byte, p, makes the units independent: r = s + p b - min(s + p b) >= 0 is what an
   option costs beyond its unit's best. Every plan's score is at least the Lagrangian bound plus the
   sum of its r, so an option whose r alone exceeds (best known score - bound) is in no better plan
   and is dropped. Few stay.
2. Dynamic programming over the units on those: states (bytes, score), dropped when the bound or
   another state rules them out. First with few states, for a good plan and so a small gap, then
   with all.

Departure: whole-file bytes are not additive (see `ledger`). Bytes are upper bounds, the limit is
relaxed by the ledger's slack, one state rules out another only when it is smaller by the slack,
and the final states are tried in order of score against the exact bytes. So the result is the
optimum under the exact bytes. The fewer options stay, the smaller the slack.

Cost: seconds for hundreds of units. Limit: where there are more than `MOST_STATES` near-equal
partial plans the most promising are kept, and how far from the optimum the plan can be is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cptq.allocation.climb import climb
from cptq.allocation.problem import Problem, Solution
from cptq.types import Candidate, Emit, Notice

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

MOST_STATES = 200_000
#: states of the first, quick search
FEW_STATES = 1_000
#: rounds of dropping options, each of which tightens the next
_ROUNDS = 6
#: relative rounding error of a sum of scores
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Options of one unit that can be in the optimum: numbers, bytes, scores, reduced costs."""

    name: str
    option: _Ints
    nbytes: _Ints
    score: _Floats
    reduced: _Floats

    def kept(self, mask: npt.NDArray[np.bool_]) -> _Unit:
        """The options under a mask."""
        return _Unit(
            name=self.name,
            option=self.option[mask],
            nbytes=self.nbytes[mask],
            score=self.score[mask],
            reduced=self.reduced[mask],
        )


@dataclass(frozen=True, kw_only=True)
class _States:
    """Partial plans: bytes, score and reduced cost so far; from which state, by which option."""

    nbytes: _Ints
    score: _Floats
    reduced: _Floats
    parent: _Ints
    option: _Ints

    def at(self, index: npt.NDArray[np.intp]) -> _States:
        """The states of some positions."""
        return _States(
            nbytes=self.nbytes[index],
            score=self.score[index],
            reduced=self.reduced[index],
            parent=self.parent[index],
            option=self.option[index],
        )


@dataclass(frozen=True, kw_only=True)
class _Core:
    """What is left of a problem: few options per unit, a price, and the distance to the bound.

    A plan can be better than the best known only if the sum of its reduced costs is within `gap`.
    """

    problem: Problem
    units: tuple[_Unit, ...]
    room: int
    price: float
    bound: float
    gap: float


def knapsack(problem: Problem, emit: Emit) -> Solution:
    """The optimum; steps that cost nothing in score then fill the budget."""
    best = climb(problem, problem.smallest())
    plan, loss = problem.candidates_of(best), problem.loss(best)
    for states in (FEW_STATES, MOST_STATES):
        core = _core(problem, loss)
        found, proven = _search(core, states)
        if found is not None and problem.predicted_loss(found) < loss:
            plan, loss = found, problem.predicted_loss(found)
        if proven:
            break
    else:
        _report_unproven(loss - core.bound, emit)
    return Solution(choices=problem.candidates_of(climb(problem, problem.picks_of(plan))))


def _core(problem: Problem, loss: float) -> _Core:
    """Drop options that no plan better than `loss` can have, until none is left to drop."""
    for _ in range(_ROUNDS):
        core = _priced_core(problem, loss)
        units = [unit.kept(unit.reduced <= core.gap) for unit in core.units]
        before = sum(len(options) for options in problem.options.values())
        if sum(len(unit.option) for unit in units) == before:
            break
        problem = problem.restricted({unit.name: unit.option.tolist() for unit in units})
    return _priced_core(problem, loss)


def _priced_core(problem: Problem, loss: float) -> _Core:
    units = [_undominated(problem, name) for name in problem.options]
    room = problem.ledger.limit + problem.ledger.slack - problem.ledger.base
    price = _price(units, room)
    units = [_priced(unit, price) for unit in units]
    bound = sum(float((u.score + price * u.nbytes).min()) for u in units) - price * room
    size = sum(float(np.abs(unit.score).max()) for unit in units) + price * abs(room)
    return _Core(
        problem=problem,
        units=tuple(units),
        room=room,
        price=price,
        bound=bound,
        gap=loss - bound + _ROUNDING * size,
    )


def _undominated(problem: Problem, name: str) -> _Unit:
    """Only options that score better than every smaller one can be needed."""
    options = problem.options[name]
    kept = [i for i, o in enumerate(options) if i == 0 or o.score < options[i - 1].score]
    return _Unit(
        name=name,
        option=np.array(kept, dtype=np.int64),
        nbytes=np.array([options[i].nbytes for i in kept], dtype=np.int64),
        score=np.array([options[i].score for i in kept]),
        reduced=np.zeros(len(kept)),
    )


def _price(units: list[_Unit], room: int) -> float:
    """The price per byte at which the cheapest plan just fits: the best Lagrangian bound."""
    steps = [
        ((u.score[0] - u.score[1:]) / (u.nbytes[1:] - u.nbytes[0])).max(initial=0.0) for u in units
    ]
    low, high = 0.0, 2.0 * max(steps, default=0.0)
    if _bytes_at(units, low) <= room:
        return low
    for _ in range(200):  # until the two are neighbours in floating point
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _bytes_at(units, middle) > room else (low, middle)
    return high


def _bytes_at(units: list[_Unit], price: float) -> int:
    """Bytes of the plan that is cheapest at a price."""
    return sum(int(u.nbytes[(u.score + price * u.nbytes).argmin()]) for u in units)


def _priced(unit: _Unit, price: float) -> _Unit:
    priced = unit.score + price * unit.nbytes
    return _Unit(
        name=unit.name,
        option=unit.option,
        nbytes=unit.nbytes,
        score=unit.score,
        reduced=priced - priced.min(),
    )


def _search(core: _Core, most_states: int) -> tuple[dict[str, Candidate] | None, bool]:
    """The best plan within the gap, if any, and whether nothing was cut off on the way."""
    # undecided units last: the early states stay few
    units = sorted(core.units, key=lambda unit: len(unit.option))
    least = _suffix_sums([int(unit.nbytes.min()) for unit in units])
    most = _suffix_sums([int(unit.nbytes.max()) for unit in units])
    slack, proven, history = core.problem.ledger.slack, True, [_start()]
    for i, unit in enumerate(units):
        states = _extend(history[-1], unit)
        unused = _unused(states, core.room - most[i + 1])
        states = _within(states, unused, core.room - least[i + 1], core)
        states = _pareto(states, slack)
        if len(states.nbytes) > most_states:
            proven = False
            states = states.at(np.sort(np.argsort(states.reduced, kind="stable")[:most_states]))
        history.append(states)
    return _first_that_fits(core.problem, units, history), proven


def _start() -> _States:
    none = np.zeros(1, dtype=np.int64)
    return _States(nbytes=none, score=np.zeros(1), reduced=np.zeros(1), parent=none, option=none)


def _suffix_sums(values: list[int]) -> list[int]:
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _extend(states: _States, unit: _Unit) -> _States:
    """Every state with every option."""
    count, width = len(states.nbytes), len(unit.option)
    return _States(
        nbytes=(states.nbytes[:, None] + unit.nbytes).ravel(),
        score=(states.score[:, None] + unit.score).ravel(),
        reduced=(states.reduced[:, None] + unit.reduced).ravel(),
        parent=np.repeat(np.arange(count, dtype=np.int64), width),
        option=np.tile(unit.option, count),
    )


def _unused(states: _States, filled: int) -> _Floats:
    """Bytes that stay unused even if all units to come take their largest option."""
    return np.maximum(filled - states.nbytes, 0).astype(np.float64)


def _within(states: _States, unused: _Floats, room: int, core: _Core) -> _States:
    """States that fit, and whose bound is in reach."""
    keep = (states.nbytes <= room) & (states.reduced + core.price * unused <= core.gap)
    return states.at(np.flatnonzero(keep))


def _pareto(states: _States, slack: int) -> _States:
    """States that no other of at least `slack` fewer bytes equals or beats; sorted by bytes."""
    states = states.at(np.lexsort((states.score, states.nbytes)))
    if not len(states.nbytes):
        return states
    best = np.minimum.accumulate(states.score)
    repeated = np.zeros(len(best), dtype=bool)
    repeated[1:] = (np.diff(states.nbytes) == 0) & (np.diff(states.score) == 0)
    rival = np.searchsorted(states.nbytes, states.nbytes - slack, side="right") - 1
    if slack == 0:
        rival = np.arange(len(best)) - 1
    beaten = (rival >= 0) & (best[np.maximum(rival, 0)] <= states.score)
    return states.at(np.flatnonzero(~beaten & ~repeated))


def _first_that_fits(
    problem: Problem, units: Sequence[_Unit], history: Sequence[_States]
) -> dict[str, Candidate] | None:
    last = history[-1]
    for index in np.lexsort((last.nbytes, last.score)):
        picks = _trace_back(units, history, int(index))
        ordered = {name: picks[name] for name in problem.options}
        if problem.fits(ordered):
            return problem.candidates_of(ordered)
    return None


def _trace_back(
    units: Sequence[_Unit], history: Sequence[_States], index: int
) -> Mapping[str, int]:
    picks = {}
    for unit, states in zip(reversed(units), reversed(history[1:]), strict=True):
        picks[unit.name] = int(states.option[index])
        index = int(states.parent[index])
    return picks


def _report_unproven(distance: float, emit: Emit) -> None:
    emit(
        Notice(
            kind="fallback",
            subject="knapsack",
            message="too many near-equal plans to prove the optimum; the summed score is at "
            f"most {distance:.3g} above it",
        )
    )
