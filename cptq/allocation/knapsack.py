"""`knapsack`: the plan of smallest summed score within the budget, exactly.

This is a multiple-choice knapsack problem: choose one option per unit so that the sum of the scores
is least and the bytes stay within the limit. It is solved in two parts, as Pisinger does ("A
minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995).

1. Pricing (a Lagrangian relaxation). Replace the limit by a price p per byte, and minimize
   score + p * bytes. Now the units are independent: each takes the option of least priced score.
   Two facts follow.

   * Bound. The sum of the least priced scores, minus p * limit, is at most the score of any plan
     that fits: such a plan pays p * bytes <= p * limit.
   * Reduced cost. An option's priced score, less the least of its unit, is what choosing it costs
     beyond the bound. A plan's score is at least bound + the sum of its reduced costs.

   If a plan with score s is known, a better plan has reduced costs that sum to at most
   gap = s - bound. An option whose own reduced cost exceeds the gap is in no better plan and is
   dropped. Usually few options stay (the core).

2. Dynamic programming over the core. Units are added one at a time; a state is a partial plan: its
   bytes, score and reduced cost. A state is dropped when it cannot be completed within the limit,
   when its reduced cost exceeds the gap (bounding), or when another state has fewer bytes and no
   higher score (Pareto pruning). Units of few options come first, so that the states stay few for
   as long as possible. The search runs twice: with few states, for a good plan and so a smaller
   gap, then with all.

Departure: the bytes of a whole file are no sum over units (see `ledger`). The bytes used here are
upper bounds. So that no plan that fits is lost, the limit is relaxed by the ledger's slack, and a
state prunes another only if it is smaller by the slack or more. Final states are tried in order of
score until one fits by its exact bytes. So the result is the optimum under the exact bytes. The
fewer options stay, the smaller is the slack.

Cost: seconds for hundreds of units. Limit: beyond `MOST_STATES` nearly equal partial plans only the
most promising are kept, and a notice reports how far from the optimum the plan can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cptq.allocation.greedy import raise_units
from cptq.allocation.problem import AllocationProblem, AllocationSolution
from cptq.types import Candidate, Emit, Notice

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

#: most states of the second, exact search
MOST_STATES = 200_000
#: most states of the first, quick search
FEW_STATES = 1_000
#: rounds of dropping options, each of which makes the slack smaller and the bound tighter
_ROUNDS = 6
#: bins of bytes that the slack is divided into, to find most dominated states without sorting
_BINS_OF_SLACK = 8
#: relative rounding error of a sum of scores
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class _CoreUnit:
    """The options of one unit that can be in the optimum, by increasing bytes.

    `option` are their indices in the problem, `reduced` their reduced costs.
    """

    name: str
    option: _Ints
    nbytes: _Ints
    score: _Floats
    reduced: _Floats

    def select(self, mask: npt.NDArray[np.bool_]) -> _CoreUnit:
        """Return the options under a mask."""
        return _CoreUnit(
            name=self.name,
            option=self.option[mask],
            nbytes=self.nbytes[mask],
            score=self.score[mask],
            reduced=self.reduced[mask],
        )


@dataclass(frozen=True, kw_only=True)
class _States:
    """Partial plans, one per position.

    `nbytes`, `score` and `reduced` are sums over the units so far. `option` is the option of the
    last unit, `parent` the position of the state of the units before it.
    """

    nbytes: _Ints
    score: _Floats
    reduced: _Floats
    parent: _Ints
    option: _Ints

    def select(self, index: npt.NDArray[np.intp]) -> _States:
        """Return the states at some positions."""
        return _States(
            nbytes=self.nbytes[index],
            score=self.score[index],
            reduced=self.reduced[index],
            parent=self.parent[index],
            option=self.option[index],
        )


@dataclass(frozen=True, kw_only=True)
class _Core:
    """What is left of a problem after dropping options.

    `room` is the limit on the bytes of the units, relaxed by the slack. A plan can be better than
    the best known only if the sum of its reduced costs is at most `gap`.
    """

    problem: AllocationProblem
    units: tuple[_CoreUnit, ...]
    room: int
    price: float
    bound: float
    gap: float


def solve_knapsack(problem: AllocationProblem, emit: Emit) -> AllocationSolution:
    """Find the optimum; steps that do not raise the score then fill the budget."""
    best = raise_units(problem, problem.pick_smallest())
    plan, loss = problem.to_choices(best), problem.sum_scores(best)
    for most_states in (FEW_STATES, MOST_STATES):
        core = _build_core(problem, loss)
        found, proven = _search(core, most_states)
        if found is not None and problem.predict_loss(found) < loss:
            plan, loss = found, problem.predict_loss(found)
        if proven:
            break
    else:
        _report_unproven(loss - core.bound, emit)
    picks = raise_units(problem, problem.to_picks(plan))
    return AllocationSolution(choices=problem.to_choices(picks))


def _build_core(problem: AllocationProblem, loss: float) -> _Core:
    """Drop options that no plan better than `loss` can have, until none is left to drop.

    Dropping options makes the ledger's slack smaller, hence the relaxed limit tighter, the bound
    higher and the gap smaller, which may drop more: so it is repeated.
    """
    for _ in range(_ROUNDS):
        core = _price_core(problem, loss)
        units = [unit.select(unit.reduced <= core.gap) for unit in core.units]
        before = sum(len(options) for options in problem.options.values())
        if sum(len(unit.option) for unit in units) == before:
            break
        problem = problem.restrict({unit.name: unit.option.tolist() for unit in units})
    return _price_core(problem, loss)


def _price_core(problem: AllocationProblem, loss: float) -> _Core:
    """Find the price per byte, and with it the bound, the gap and all reduced costs."""
    units = [_drop_dominated(problem, name) for name in problem.options]
    room = problem.ledger.limit + problem.ledger.slack - problem.ledger.base
    price = _find_price(units, room)
    units = [_add_reduced_costs(unit, price) for unit in units]
    bound = sum(float((u.score + price * u.nbytes).min()) for u in units) - price * room
    # the gap is a small difference of large sums: widen it by the rounding error of those
    size = sum(float(np.abs(unit.score).max()) for unit in units) + price * abs(room)
    return _Core(
        problem=problem,
        units=tuple(units),
        room=room,
        price=price,
        bound=bound,
        gap=loss - bound + _ROUNDING * size,
    )


def _drop_dominated(problem: AllocationProblem, name: str) -> _CoreUnit:
    """Return the options of a unit that score better than every smaller one."""
    options = problem.options[name]
    # scores never increase with bytes, so the next smaller option has the best score so far
    kept = [i for i, o in enumerate(options) if i == 0 or o.score < options[i - 1].score]
    return _CoreUnit(
        name=name,
        option=np.array(kept, dtype=np.int64),
        nbytes=np.array([options[i].nbytes for i in kept], dtype=np.int64),
        score=np.array([options[i].score for i in kept]),
        reduced=np.zeros(len(kept)),
    )


def _find_price(units: list[_CoreUnit], room: int) -> float:
    """Return the smallest price per byte at which the plan of least priced score fits.

    It gives the highest bound. The higher the price, the smaller that plan, so it is found by
    bisection between 0 and a price above the steepest score decrease per byte, at which every unit
    takes its smallest option.
    """
    steps = [
        ((u.score[0] - u.score[1:]) / (u.nbytes[1:] - u.nbytes[0])).max(initial=0.0) for u in units
    ]
    low, high = 0.0, 2.0 * max(steps, default=0.0)
    if _count_bytes_at(units, low) <= room:
        return low
    for _ in range(200):  # until the two are neighbours in floating point
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _count_bytes_at(units, middle) > room else (low, middle)
    return high


def _count_bytes_at(units: list[_CoreUnit], price: float) -> int:
    """Return the bytes of the plan of least priced score."""
    return sum(int(u.nbytes[(u.score + price * u.nbytes).argmin()]) for u in units)


def _add_reduced_costs(unit: _CoreUnit, price: float) -> _CoreUnit:
    priced = unit.score + price * unit.nbytes
    return _CoreUnit(
        name=unit.name,
        option=unit.option,
        nbytes=unit.nbytes,
        score=unit.score,
        reduced=priced - priced.min(),
    )


def _search(core: _Core, most_states: int) -> tuple[dict[str, Candidate] | None, bool]:
    """Search the core by dynamic programming.

    Returns:
        The best plan within the gap, if there is one, and whether that is proven: no state was
        dropped for want of space.
    """
    # Order: units of few options first. States multiply by the options of each unit added, so the
    # undecided units come last, when bytes and score so far prune most.
    units = sorted(core.units, key=lambda unit: len(unit.option))
    # bytes that the units still to come take, at least and at most
    least = _sum_suffixes([int(unit.nbytes.min()) for unit in units])
    most = _sum_suffixes([int(unit.nbytes.max()) for unit in units])
    slack, proven, history = core.problem.ledger.slack, True, [_start()]
    for i, unit in enumerate(units):
        states = _extend(history[-1], unit, core, least=least[i + 1], most=most[i + 1])
        states = _drop_pareto_dominated(states, slack)
        if len(states.nbytes) > most_states:
            proven = False
            # keep those nearest to the bound, in their order by bytes
            states = states.select(np.sort(np.argsort(states.reduced, kind="stable")[:most_states]))
        history.append(states)
    return _find_first_fit(core.problem, units, history), proven


def _start() -> _States:
    """Return the one state without units."""
    none = np.zeros(1, dtype=np.int64)
    return _States(nbytes=none, score=np.zeros(1), reduced=np.zeros(1), parent=none, option=none)


def _sum_suffixes(values: list[int]) -> list[int]:
    """Return the sums of values[0:], values[1:], ..., values[n:] = 0."""
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _extend(states: _States, unit: _CoreUnit, core: _Core, least: int, most: int) -> _States:
    """Combine every state with every option of the next unit, where that leads anywhere.

    Kept is what can still fit if the units to come take `least` bytes, can still beat the best plan
    (the gap), and is not seen at once to be dominated. The bound paid p for every byte of the
    limit, so a byte that stays unused even if the units to come take `most` costs p beyond it.
    """
    nbytes = (states.nbytes[:, None] + unit.nbytes).ravel()
    reduced = (states.reduced[:, None] + unit.reduced).ravel()
    unused = np.maximum(core.room - most - nbytes, 0)
    keep = (nbytes <= core.room - least) & (reduced + core.price * unused <= core.gap)
    index = np.flatnonzero(keep)
    parent, option = np.divmod(index, len(unit.option))
    score = states.score[parent] + unit.score[option]
    kept = _find_not_clearly_dominated(nbytes[index], score, core.problem.ledger.slack)
    index = index[kept]
    return _States(
        nbytes=nbytes[index],
        score=score[kept],
        reduced=reduced[index],
        parent=parent[kept],
        option=unit.option[option[kept]],
    )


def _find_not_clearly_dominated(nbytes: _Ints, score: _Floats, slack: int) -> npt.NDArray[np.intp]:
    """Return the positions of the states that no bin of smaller ones dominates, without sorting.

    States are put into bins of equal width by their bytes. All of a bin are smaller by the slack
    than those of a bin that is `apart` further on. What this drops, sorting would drop as well, as
    domination is transitive (`_drop_pareto_dominated`), and sorting the few that are left is quick.
    """
    if not len(nbytes):
        return np.arange(0)
    first, least = int(nbytes.min()), max(slack, 1)
    width = max(least // _BINS_OF_SLACK, int(nbytes.max() - first) // len(nbytes) + 1)
    place = (nbytes - first) // width
    best = np.full(int(place.max()) + 1, np.inf)
    np.minimum.at(best, place, score)
    best = np.minimum.accumulate(best)
    apart = 1 + -(-(least - 1) // width)
    smaller = np.concatenate([np.full(apart, np.inf), best])
    return np.flatnonzero(smaller[place] > score)


def _drop_pareto_dominated(states: _States, slack: int) -> _States:
    """Keep the states that no other dominates; the result is sorted by bytes.

    A state dominates another if its score is no higher and its bytes are fewer by `slack` or more:
    only then is it smaller whatever the exact bytes are, and every completion of the other fits
    with it as well. Without slack fewer bytes alone decide, and of equal bytes the better score.
    """
    states = states.select(np.lexsort((states.score, states.nbytes)))
    if not len(states.nbytes):
        return states
    # best[i]: the least score among states 0 .. i, which have no more bytes than state i
    best = np.minimum.accumulate(states.score)
    repeated = np.zeros(len(best), dtype=bool)
    repeated[1:] = (np.diff(states.nbytes) == 0) & (np.diff(states.score) == 0)
    # the last state that is smaller by the slack; -1 where there is none
    smaller = np.searchsorted(states.nbytes, states.nbytes - slack, side="right") - 1
    if slack == 0:
        smaller = np.arange(len(best)) - 1
    dominated = (smaller >= 0) & (best[np.maximum(smaller, 0)] <= states.score)
    return states.select(np.flatnonzero(~dominated & ~repeated))


def _find_first_fit(
    problem: AllocationProblem, units: Sequence[_CoreUnit], history: Sequence[_States]
) -> dict[str, Candidate] | None:
    """Return the plan of least score that keeps the limit by its exact bytes."""
    last = history[-1]
    for index in np.lexsort((last.nbytes, last.score)):
        picks = _trace_back(units, history, int(index))
        ordered = {name: picks[name] for name in problem.options}
        if problem.fits(ordered):
            return problem.to_choices(ordered)
    return None


def _trace_back(
    units: Sequence[_CoreUnit], history: Sequence[_States], index: int
) -> Mapping[str, int]:
    """Return the picks of a final state, from the last unit back to the first."""
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
            message="too many nearly equal plans to prove the optimum; the summed score is at "
            f"most {distance:.3g} above it",
        )
    )
