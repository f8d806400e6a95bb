"""From a budget to a plan, by any registered allocator; and whether a plan fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.allocation import ALLOCATORS, BLIND
from cptq.allocation.cost import CostModel
from cptq.allocation.experts import Options, check_tied, expert_units, solve_tied
from cptq.allocation.ledger import Ledger
from cptq.allocation.problem import Solution, build_problem
from cptq.allocation.targets import ledger_of, smallest_plan
from cptq.errors import BudgetError, PlanError
from cptq.types import Budget, Candidate, Emit, Notice, Plan, SensitivityTable


def allocate(
    name: str,
    table: SensitivityTable | None,
    cost: CostModel,
    budget: Budget,
    candidates: Sequence[Candidate],
    *,
    model_fingerprint: str,
    emit: Emit,
    options: Mapping[str, Sequence[Candidate]] | None = None,
) -> Plan:
    """Give every unit a candidate.

    Args:
        name: a name of `ALLOCATORS`.
        table: the scores; only those of `BLIND` do without.
        cost: the model's bytes.
        budget: what the file may take; never exceeded. All but `uniform` also leave less than the
            smallest step that is still possible.
        candidates: what a unit can get.
        model_fingerprint: of the model the plan is for.
        emit: receives what must be said.
        options: the candidates of each unit, where pins or limits make them differ.

    Returns:
        The plan; `predicted_bytes` is the exact size of the file, `predicted_loss` the sum of the
        (monotone) scores, None without a table.

    Raises:
        UnknownNameError: no such allocator.
        PlanError: the table is of another model, or lacks a unit or a candidate.
        BudgetError: no plan fits.
    """
    ALLOCATORS.get(name)
    _check(name, table, candidates, model_fingerprint)

    def solve(options: Options, emit: Emit) -> Plan:
        return _solve(name, table, cost, budget, candidates, options, model_fingerprint, emit)

    if not expert_units(cost.units):
        return solve(options or {}, emit)
    rows = {
        u.name: cost.options(u.name, (options or {}).get(u.name, candidates)) for u in cost.units
    }
    return solve_tied(cost.units, rows, solve, emit)


def _solve(
    name: str,
    table: SensitivityTable | None,
    cost: CostModel,
    budget: Budget,
    candidates: Sequence[Candidate],
    options: Options,
    model_fingerprint: str,
    emit: Emit,
) -> Plan:
    """As `allocate`, every unit for itself."""
    if name in BLIND and any(candidate.sparsity for candidate in candidates):
        message = "asks no score, which could weigh sparsity against bits: nothing becomes sparse"
        emit(Notice(kind="warning", subject=name, message=message))
        options = {unit: without_sparse(row) for unit, row in options.items()}
        candidates = without_sparse(candidates)
    ledger = ledger_of(budget, cost, options or candidates)
    least = smallest_plan(ledger)
    if not ledger.fits(least, ledger.total(least)):
        raise BudgetError(
            f"the budget of {budget.limit_bytes:,} bytes ({budget.asked}) is below the smallest "
            f"plan, which takes {cost.file_bytes(least):,}",
            allowed="a larger target, smaller --bits, or looser --pin and --min-bits",
        )
    problem = build_problem(table, ledger, candidates, emit)
    solution = ALLOCATORS.get(name)(problem, emit)
    loss = None if table is None else problem.predicted_loss(solution.choices)
    notes = (*solution.notes, *_unused(ledger, solution))
    for note in notes:
        emit(Notice(kind="info", subject=name, message=note))
    return Plan(
        model_fingerprint=model_fingerprint,
        budget=budget,
        allocator=name,
        metric=None if table is None else table.metric,
        table_digest=None if table is None else table.digest,
        choices=dict(solution.choices),
        predicted_bytes=cost.file_bytes(solution.choices),
        predicted_loss=loss,
        notes=notes,
    )


def without_sparse(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that keep every weight; all of them where none does."""
    return tuple(c for c in candidates if not c.sparsity) or tuple(candidates)


def _check(
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
            hint="name one with --metric, or take --allocator uniform",
        )
    if table is not None and table.model_fingerprint != model_fingerprint:
        raise PlanError(
            f"the {table.metric} measurement was made on another model "
            f"({table.model_fingerprint[:12]}, this is {model_fingerprint[:12]})",
            hint="measure this model with cptq analyze",
        )


def _unused(ledger: Ledger, solution: Solution) -> tuple[str, ...]:
    """A word where the budget is more than the candidates can use."""
    largest = all(
        ledger.bytes_of[unit][candidate] == max(ledger.bytes_of[unit].values())
        for unit, candidate in solution.choices.items()
    )
    left = ledger.limit - ledger.exact(solution.choices)
    if not largest or not left or solution.notes:
        return ()
    return (f"every unit has its largest candidate; {left:,} bytes of the budget are left",)


def check_plan(plan: Plan, cost: CostModel, model_fingerprint: str) -> None:
    """Whether a plan, perhaps edited by hand, can be carried out on a model.

    Raises:
        PlanError: it is of another model, lacks a unit, names one that is not there, wants what
            the format cannot hold, or gives experts more than one scheme.
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
            f"the plan says nothing about {missing[0]!r}"
            + (f" and {len(missing) - 1} other units" if len(missing) > 1 else ""),
            allowed="every unit once, with a label such as w4g64, or w16 to keep it dense",
        )
    for unit, candidate in plan.choices.items():
        cost.unit_tensors(unit, candidate)
        why = cost.refusal(unit, candidate)
        if why is not None:
            raise PlanError(
                f"the plan gives {unit} {candidate.label}: {why}",
                allowed="what the runtime takes, or w16 to keep it dense",
                hint="edit the plan, or name another --runtime",
            )
    check_tied(cost.units, plan.choices)
