"""Why a plan gives a unit its bits: what its other options cost and buy, at the plan's price.

For a unit u with candidate c and the options o of its row, all else as in the plan,

    bytes(o) = file(plan with u = o) - file(plan)        exact, header included
    loss(o)  = score(u, o) - score(u, c)                 as predicted

A step up is worth r = -loss / bytes, the loss that a byte more takes off. The *price* of a plan is
the largest r among the steps up, one option further for one unit, that it leaves out. A plan from
`knapsack` has taken nearly all steps that are worth more, so a unit whose step is worth less than
the price stays where it is; one whose step is worth the most is held back by the bytes that are
left alone (Everett 1963, Operations Research 11(3): the price is the Lagrange multiplier of the
budget, and a gap can remain, as steps are not divisible).

Limit: predictions are sums of single scores; where errors do not add up, below 3 bits, neither do
the differences. Cost: a count of the file per option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.allocation.ledger import Ledger
from cptq.allocation.problem import AllocationProblem, Option
from cptq.types import Candidate, Explanation, Plan, Step


def explain_unit(unit: str, plan: Plan, ledger: Ledger, problem: AllocationProblem) -> Explanation:
    """Explain the choice of a plan for one unit.

    Args:
        unit: a name of the problem.
        plan: for the units of the problem.
        ledger: of the budget that the plan was made for.
        problem: the options with scores that the plan was made from (`build_problem`).
    """
    spec = next(known for known in ledger.cost.units if known.name == unit)
    ups = {name: rate for name in problem.options if (rate := _rate_up(problem, plan, name))}
    downs = [_rate_down(problem, plan, name) for name in problem.options if name != unit]
    costs = [rate for rate in downs if rate is not None]
    chosen = problem.options[unit][_find(problem, plan, unit)]
    own = ups.get(unit)
    return Explanation(
        unit=unit,
        role=spec.role,
        weights=spec.numel,
        target=plan.budget.asked,
        chosen=plan.choices[unit],
        score=chosen.score,
        steps=tuple(_list_steps(unit, plan, ledger, problem.options[unit], chosen)),
        left=max(0, ledger.limit - ledger.count_bytes(plan.choices)),
        count=len(ups),
        rank=None if own is None else 1 + sum(rate > own for rate in ups.values()),
        price=max(ups.values(), default=None),
        least=min(costs, default=None),
    )


def _list_steps(
    unit: str, plan: Plan, ledger: Ledger, row: Sequence[Option], chosen: Option
) -> list[Step]:
    now = ledger.cost.file_bytes(plan.choices)

    def count(candidate: Candidate) -> int:
        return ledger.cost.file_bytes({**plan.choices, unit: candidate}) - now

    own = Step(candidate=plan.choices[unit], nbytes=0, loss=0.0)
    others = [
        Step(candidate=o.candidate, nbytes=count(o.candidate), loss=o.score - chosen.score)
        for o in row
        if o is not chosen
    ]
    return sorted([own, *others], key=lambda step: (step.nbytes, -step.loss))


def _find(problem: AllocationProblem, plan: Plan, unit: str) -> int:
    return problem.find_level(unit, plan.choices[unit])


def _rate_up(problem: AllocationProblem, plan: Plan, unit: str) -> float | None:
    row, level = problem.options[unit], _find(problem, plan, unit)
    steps = [o for o in row[level + 1 :] if o.score < row[level].score]
    return _divide(row[level], steps[0]) if steps else None


def _rate_down(problem: AllocationProblem, plan: Plan, unit: str) -> float | None:
    row, level = problem.options[unit], _find(problem, plan, unit)
    return _divide(row[level - 1], row[level]) if level else None


def _divide(small: Option, large: Option) -> float:
    return (small.score - large.score) / max(1, large.nbytes - small.nbytes)


def find_choice(
    text: str, sizes: Mapping[Candidate, int], scores: Mapping[Candidate, float]
) -> Candidate | None:
    """Return the option of a unit that a label or a number of bits names; None if it has none.

    Of several ways to store a width the dense grid of least score counts, then of fewest bytes.
    """
    named = [candidate for candidate in sizes if candidate.label == text]
    wide = [c for c in sizes if str(c.bits) == text and not c.sparsity]
    order = sorted(named or wide, key=lambda c: (scores.get(c, 0.0), sizes[c], c))
    return order[0] if order else None
