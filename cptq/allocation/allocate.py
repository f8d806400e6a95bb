"""From a ledger to a plan, by any registered allocator; and checks of a plan against a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cptq.allocation import ALLOCATORS, BLIND, EXACT
from cptq.allocation.cost import CostModel
from cptq.allocation.experts import check_tied, list_experts, solve_tied
from cptq.allocation.ledger import Ledger
from cptq.allocation.problem import AllocationSolution, build_problem
from cptq.errors import BudgetError, PlanError
from cptq.types import Candidate, Emit, Notice, Plan, SensitivityTable


def allocate(
    name: str,
    table: SensitivityTable | None,
    ledger: Ledger,
    candidates: Sequence[Candidate],
    *,
    model_fingerprint: str,
    emit: Emit,
) -> Plan:
    """Give every unit a candidate.

    Args:
        name: a name of `ALLOCATORS`.
        table: the scores; only the allocators of `BLIND` work without.
        ledger: the budget, and the candidates of each unit. The budget is never exceeded. All
            allocators but `uniform` leave less than the smallest step that is still possible.
        candidates: those offered to all units, of which the ledger lists what each can have.
        model_fingerprint: of the model that the plan is for.
        emit: receives notices.

    Returns:
        The plan; `predicted_bytes` is the exact size of the file, `predicted_loss` the sum of the
        (monotone) scores, None without a table.

    Raises:
        UnknownNameError: there is no such allocator.
        PlanError: the table is of another model, or lacks a unit or a candidate.
        BudgetError: no plan fits.
    """
    ALLOCATORS.get(name)
    _check_inputs(name, table, candidates, model_fingerprint)

    def solve(ledger: Ledger, emit: Emit) -> Plan:
        return _solve(name, table, ledger, candidates, model_fingerprint, emit)

    if list_experts(ledger.cost.units):
        return solve_tied(ledger, solve, emit, exact=name in EXACT)
    return solve(ledger, emit)


def _solve(
    name: str,
    table: SensitivityTable | None,
    ledger: Ledger,
    candidates: Sequence[Candidate],
    model_fingerprint: str,
    emit: Emit,
) -> Plan:
    """Allocate with every unit free."""
    if name in BLIND and any(candidate.sparsity for candidate in candidates):
        message = "uses no scores and cannot weigh sparsity against bits: no unit becomes sparse"
        emit(Notice(kind="warning", subject=name, message=message))
        ledger = ledger.restrict({u: drop_sparse(row) for u, row in ledger.bytes_of.items()})
        candidates = drop_sparse(candidates)
    _check_reachable(ledger)
    problem = build_problem(table, ledger, candidates, emit)
    solution = ALLOCATORS.get(name)(problem, emit)
    loss = None if table is None else problem.predict_loss(solution.choices)
    notes = (*solution.notes, *_describe_unused(ledger, solution))
    for note in notes:
        emit(Notice(kind="info", subject=name, message=note))
    return Plan(
        model_fingerprint=model_fingerprint,
        budget=ledger.budget,
        allocator=name,
        metric=None if table is None else table.metric,
        table_digest=None if table is None else table.digest,
        choices=dict(solution.choices),
        predicted_bytes=ledger.cost.file_bytes(solution.choices),
        predicted_loss=loss,
        notes=notes,
    )


def drop_sparse(candidates: Collection[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates without sparsity; all of them if every one is sparse."""
    return tuple(c for c in candidates if not c.sparsity) or tuple(candidates)


def _check_inputs(
    name: str,
    table: SensitivityTable | None,
    candidates: Sequence[Candidate],
    model_fingerprint: str,
) -> None:
    if not candidates:
        raise PlanError("there are no candidates to choose from", allowed="--bits of 2 to 8, or 16")
    if table is None and name not in BLIND:
        raise PlanError(
            f"the allocator {name} needs the scores of a metric",
            hint="name one with --metric, or use --allocator uniform",
        )
    if table is not None and table.model_fingerprint != model_fingerprint:
        raise PlanError(
            f"the {table.metric} measurement was made on another model "
            f"({table.model_fingerprint[:12]}, this is {model_fingerprint[:12]})",
            hint="measure this model with cptq analyze",
        )


def _check_reachable(ledger: Ledger) -> None:
    least = ledger.find_smallest()
    if not ledger.fits(least, ledger.sum_bytes(least)):
        budget = ledger.budget
        raise BudgetError(
            f"the budget of {budget.limit_text} ({budget.asked}) is below the smallest plan, which "
            f"takes {ledger.count_bytes(least):,}",
            allowed="a larger target, smaller --bits, or looser --pin and --min-bits",
        )


def _describe_unused(ledger: Ledger, solution: AllocationSolution) -> tuple[str, ...]:
    """Return a note if the budget is more than the candidates can use."""
    at_largest = all(
        ledger.bytes_of[unit][candidate] == max(ledger.bytes_of[unit].values())
        for unit, candidate in solution.choices.items()
    )
    left = ledger.limit - ledger.count_bytes(solution.choices)
    if not at_largest or not left or solution.notes:
        return ()
    return (f"every unit has its largest candidate; {left:,} bytes of the budget are unused",)


def check_plan(plan: Plan, cost: CostModel, model_fingerprint: str) -> None:
    """Check that a plan, possibly edited by hand, can be carried out on a model.

    Raises:
        PlanError: the plan is of another model, lacks a unit, names an unknown one, contains a
            candidate that the format or runtime cannot hold, or gives experts more than one scheme.
    """
    if plan.model_fingerprint != model_fingerprint:
        raise PlanError(
            f"the plan was made for another model ({plan.model_fingerprint[:12]}, this is "
            f"{model_fingerprint[:12]})",
            hint="make a plan for this model with cptq compress --target",
        )
    missing = [unit.name for unit in cost.units if unit.name not in plan.choices]
    if missing:
        raise PlanError(
            f"the plan has no choice for {missing[0]!r}"
            + (f" and {len(missing) - 1} other units" if len(missing) > 1 else ""),
            allowed="every unit once, with a label such as w4g64, or w16 to keep it dense",
        )
    for unit, candidate in plan.choices.items():
        cost.list_unit_tensors(unit, candidate)
        why = cost.explain_refusal(unit, candidate)
        if why is not None:
            raise PlanError(
                f"the plan gives {unit} {candidate.label}: {why}",
                allowed="a candidate that the runtime supports, or w16 to keep it dense",
                hint="edit the plan, or name another --runtime",
            )
    check_tied(cost.units, plan.choices)
