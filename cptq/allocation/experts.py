"""One candidate for all experts of a mixture-of-experts model, as stock transformers requires.

transformers stacks the experts of a block into one tensor, and unpacks all of them by the one
scheme that it finds for experts. With two schemes it silently loads random weights, and dense
experts beside packed attention do not load at all (transformers 5.23). So the units of experts are
tied. If a plan made without that rule gives all experts one candidate, it stands. Otherwise the
problem is solved once per candidate that all experts can have, with the experts fixed to it, and
the best plan is taken: least predicted loss, or without scores the plan whose smallest width is
largest, then the largest plan.

For an exact allocator the plan without the rule is not made: if it gave all experts one candidate,
it would be the best of those with the experts fixed. It is the dearest of all, as many units of one
size have many nearly equal plans. The exception is a budget for the whole model at 16 bits.

One scheme also means one group size: it must divide the inputs of all expert layers.

Cost: as many allocations as candidates, each with the units outside the experts free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from cptq.allocation.ledger import Ledger, Options
from cptq.errors import BudgetError, PlanError
from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, Emit, Plan, Unit

Solve = Callable[[Ledger, Emit], Plan]
#: a plan, and the events that making it emitted
Attempt = tuple[Plan, list[object]]


def list_experts(units: Sequence[Unit]) -> list[str]:
    """Return the names of the units that belong to experts."""
    return [unit.name for unit in units if any(layer.expert for layer in unit.layers)]


def fix_experts(ledger: Ledger, candidate: Candidate) -> Ledger:
    """Return the ledger with all experts fixed to one candidate; the same without experts."""
    experts = list_experts(ledger.cost.units)
    if not experts:
        return ledger
    return ledger.restrict({**ledger.bytes_of, **dict.fromkeys(experts, (candidate,))})


def solve_tied(ledger: Ledger, solve: Solve, emit: Emit, *, exact: bool) -> Plan:
    """Find the best plan that gives all experts one candidate.

    Args:
        ledger: the budget and the options of a model that has experts.
        solve: makes a plan in which every unit is free.
        emit: receives the events of the plan that is returned.
        exact: `solve` finds the least predicted loss of all plans that fit.

    Raises:
        PlanError: there is no width below 16 bits that all experts can have.
        BudgetError: no plan fits, whatever the experts get.
    """
    units = ledger.cost.units
    found = None if exact and not _fits_dense(ledger) else _try(solve, ledger)
    if found is None or not _is_tied(units, found[0].choices):
        attempts = _try_each(ledger, solve)
        found = min(attempts, key=lambda attempt: _rank(attempt[0]))
    plan, events = found
    for event in events:
        emit(event)  # type: ignore[arg-type]
    check_tied(units, plan.choices)
    return plan


def _fits_dense(ledger: Ledger) -> bool:
    """Return whether every unit can be dense and the budget holds that."""
    dense = {unit: c for unit, row in ledger.bytes_of.items() for c in row if c.dense}
    return len(dense) == len(ledger.bytes_of) and ledger.count_bytes(dense) <= ledger.limit


def _try_each(ledger: Ledger, solve: Solve) -> list[Attempt]:
    """Make a plan for each candidate that the experts can be fixed to."""
    found = []
    failure: BudgetError | None = None
    for candidate in _list_common(list_experts(ledger.cost.units), ledger.bytes_of):
        try:
            found.append(_try(solve, fix_experts(ledger, candidate)))
        except BudgetError as error:
            failure = failure or error
    if failure is not None and not found:
        raise failure
    return found


def _try(solve: Solve, ledger: Ledger) -> Attempt:
    events: list[object] = []
    return solve(ledger, events.append), events


def check_tied(units: Sequence[Unit], choices: Mapping[str, Candidate]) -> None:
    """Check that a plan gives all experts one candidate, not dense if other units are packed.

    Raises:
        PlanError: it does not.
    """
    chosen = {choices[name] for name in list_experts(units)}
    if len(chosen) > 1:
        labels = ", ".join(sorted(candidate.label for candidate in chosen))
        raise PlanError(
            f"the plan gives experts {labels}, and transformers loads one scheme for all of them",
            allowed="the same label for every unit of experts",
        )
    if not _is_tied(units, choices):
        raise _build_dense_error()
    for candidate in chosen:
        _check_group(units, candidate)


def _is_tied(units: Sequence[Unit], choices: Mapping[str, Candidate]) -> bool:
    chosen = {choices[name] for name in list_experts(units)}
    dense = any(candidate.dense for candidate in chosen)
    return len(chosen) < 2 and (not dense or all(c.dense for c in choices.values()))


def _list_common(experts: Sequence[str], options: Options) -> list[Candidate]:
    """Return the candidates below 16 bits that all experts can have, smallest first."""
    common = set.intersection(*(set(options[name]) for name in experts))
    packed = sorted(candidate for candidate in common if not candidate.dense)
    if packed:
        return packed
    if common and all(c.dense for row in options.values() for c in row):
        return sorted(common)
    if common:
        raise _build_dense_error()
    raise PlanError(
        "--pin, --min-bits or --max-bits leave experts no width in common, and transformers loads "
        "one scheme for all of them",
        allowed="the same width for every expert",
    )


def _check_group(units: Sequence[Unit], candidate: Candidate) -> None:
    layers = (layer for unit in units for layer in unit.layers if layer.expert)
    widths = sorted({layer.shape[1] for layer in layers})
    groups = {width: resolve_group(width, candidate.group_size) for width in widths}
    sizes = sorted(set(groups.values()))
    per_channel = all(width == group for width, group in groups.items())
    if not candidate.dense and len(sizes) > 1 and not per_channel:
        raise PlanError(
            f"experts have layers of {' and '.join(map(str, widths))} inputs, for which "
            f"{candidate.label} has groups of {' and '.join(map(str, sizes))}; "
            "transformers loads one scheme for all experts",
            allowed=f"--group-size that divides {math.gcd(*widths)}, or 0 (per channel)",
        )


def _build_dense_error() -> PlanError:
    return PlanError(
        "transformers cannot load dense experts beside packed layers",
        allowed="one width below 16 bits for all experts, or 16 bits for the whole model",
    )


def _rank(plan: Plan) -> tuple[float, int, int]:
    least = min(candidate.bits for candidate in plan.choices.values())
    return plan.predicted_loss or 0.0, -least, -plan.predicted_bytes
