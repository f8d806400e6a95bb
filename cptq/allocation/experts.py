"""One scheme for all experts of a mixture: what stock transformers loads, and no plan may break.

It unpacks experts while it stacks them, all by the one scheme that it finds for experts; with two
schemes it loads random weights in silence, and dense experts beside packed attention not at all
(transformers 5.23). So the units of experts are tied. Where a plan made without regard to that
gives all of them the same, it stands; else the problem is solved once for each candidate that all
may have, with the experts fixed to it, and the best plan is taken: the smallest predicted loss, or
without scores the plan whose smallest width is largest, then the largest.

One scheme also means one group size: one that divides the inputs of all experts' layers.

Cost: as many allocations as candidates, each with as many units free as lie outside the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from cptq.errors import BudgetError, PlanError
from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, Emit, Plan, Unit

Options = Mapping[str, Sequence[Candidate]]
Solve = Callable[[Options, Emit], Plan]
#: a plan, and what making it had to say
Attempt = tuple[Plan, list[object]]


def expert_units(units: Sequence[Unit]) -> list[str]:
    """The names of the units that are experts."""
    return [unit.name for unit in units if any(layer.expert for layer in unit.layers)]


def solve_tied(units: Sequence[Unit], options: Options, solve: Solve, emit: Emit) -> Plan:
    """The best plan that gives all experts among the units one candidate.

    Raises:
        PlanError: there is no width below 16 bits that all of them may have.
        BudgetError: with none of them a plan fits.
    """
    found = _attempt(solve, options)
    if not _tied(units, found[0].choices):
        found = min(_each(units, options, solve), key=lambda attempt: _rank(attempt[0]))
    plan, events = found
    for event in events:
        emit(event)  # type: ignore[arg-type]
    check_tied(units, plan.choices)
    return plan


def _each(units: Sequence[Unit], options: Options, solve: Solve) -> list[Attempt]:
    """A plan for each candidate that the experts can be fixed to."""
    experts, found = expert_units(units), []
    failure: BudgetError | None = None
    for candidate in _common(experts, options):
        try:
            found.append(_attempt(solve, fixed(experts, options, candidate)))
        except BudgetError as error:
            failure = failure or error
    if failure is not None and not found:
        raise failure
    return found


def _attempt(solve: Solve, options: Options) -> Attempt:
    events: list[object] = []
    return solve(options, events.append), events


def fixed(experts: Sequence[str], options: Options, candidate: Candidate) -> Options:
    """The options with one left to the experts."""
    return {**options, **dict.fromkeys(experts, (candidate,))}


def check_tied(units: Sequence[Unit], choices: Mapping[str, Candidate]) -> None:
    """Whether a plan gives all experts one candidate, and none that is dense beside packed layers.

    Raises:
        PlanError: it does not.
    """
    chosen = {choices[name] for name in expert_units(units)}
    if len(chosen) > 1:
        labels = ", ".join(sorted(candidate.label for candidate in chosen))
        raise PlanError(
            f"the plan gives experts {labels}, and transformers loads one scheme for all of them",
            allowed="the same label for every unit of experts",
        )
    if not _tied(units, choices):
        raise _dense_experts()
    for candidate in chosen:
        _check_group(units, candidate)


def _tied(units: Sequence[Unit], choices: Mapping[str, Candidate]) -> bool:
    chosen = {choices[name] for name in expert_units(units)}
    dense = any(candidate.dense for candidate in chosen)
    return len(chosen) < 2 and (not dense or all(c.dense for c in choices.values()))


def _common(experts: Sequence[str], options: Options) -> list[Candidate]:
    """Candidates below 16 bits that all experts may have, smallest first."""
    common = set.intersection(*(set(options[name]) for name in experts))
    packed = sorted(candidate for candidate in common if not candidate.dense)
    if packed:
        return packed
    if common and all(c.dense for row in options.values() for c in row):
        return sorted(common)
    if common:
        raise _dense_experts()
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
    channels = all(width == group for width, group in groups.items())
    if not candidate.dense and len(sizes) > 1 and not channels:
        raise PlanError(
            f"experts have layers of {' and '.join(map(str, widths))} inputs, on which "
            f"{candidate.label} has groups of {' and '.join(map(str, sizes))}; "
            "transformers loads one scheme for all experts",
            allowed=f"--group-size that divides {math.gcd(*widths)}, or 0 (per channel)",
        )


def _dense_experts() -> PlanError:
    return PlanError(
        "experts that stay dense beside packed layers do not load in transformers",
        allowed="one width below 16 bits for all experts, or 16 bits for the whole model",
    )


def _rank(plan: Plan) -> tuple[float, int, int]:
    least = min(candidate.bits for candidate in plan.choices.values())
    return plan.predicted_loss or 0.0, -least, -plan.predicted_bytes
