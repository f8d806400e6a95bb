"""What plans predict, as `cptq plan`, `--dry-run` and reports show it: sizes, losses, the front.

The front is made of plans for a ladder of sizes, from the smallest plan to that of the widest
packed options, by the run's allocator and by the baseline one (`even`), and of the plans that were
asked for. Each costs one allocation; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cptq.allocation import BLIND
from cptq.allocation.allocate import allocate
from cptq.allocation.ledger import Ledger, build_ledger
from cptq.errors import BudgetError
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.uniform_check import BASELINE
from cptq.report.plans import PlannedTarget, PlanView
from cptq.report.summary import FrontPoint
from cptq.types import Budget, Candidate, Emit, Event, Plan, Progress, SensitivityTable

#: sizes of the ladder
STEPS = 10


def view_plans(
    inputs: CompressInputs,
    plans: Sequence[Plan],
    tables: Mapping[str, SensitivityTable],
    time_plan: Callable[[Plan], float],
    emit: Emit,
) -> PlanView:
    """Return plans with what they predict.

    Args:
        inputs: of the run.
        plans: to be shown, of one allocator.
        tables: {metric: scores}; at most one. Without there is no front.
        time_plan: returns the estimated seconds of carrying a plan out.
        emit: receives progress.
    """
    table = next(iter(tables.values()), None)
    cost = inputs.space.cost
    planned = tuple(
        PlannedTarget(
            plan=plan,
            size=cost.make_size_report(plan.choices),
            uniform_loss=_predict_baseline(inputs, table, plan.predicted_bytes),
            seconds=time_plan(plan),
        )
        for plan in plans
    )
    return PlanView(
        units=inputs.model.all_units,
        planned=planned,
        front=predict_front(inputs, table, plans, emit),
        score_unit=table.score_unit if table else "",
    )


def allocate_within(
    inputs: CompressInputs,
    allocator: str,
    table: SensitivityTable | None,
    ledger: Ledger,
    emit: Emit,
) -> Plan:
    """Return an allocator's plan for a ledger of this run's options."""
    return allocate(
        allocator,
        table,
        ledger,
        inputs.space.candidates,
        model_fingerprint=inputs.model.fingerprint,
        emit=emit,
    )


def limit_file(inputs: CompressInputs, nbytes: int) -> Ledger:
    """Return the ledger of a limit on the whole file."""
    budget = Budget(limit_bytes=nbytes, asked=f"{nbytes}B")
    return build_ledger(budget, inputs.space.cost, inputs.space.options)


def _predict_baseline(
    inputs: CompressInputs, table: SensitivityTable | None, nbytes: int
) -> float | None:
    """Return the predicted loss of the baseline plan within as many bytes; None: there is none."""
    if table is None:
        return None
    try:
        ledger = limit_file(inputs, nbytes)
        return allocate_within(inputs, BASELINE, table, ledger, _ignore).predicted_loss
    except BudgetError:  # of the candidates only sparse ones are small enough
        return None


def predict_front(
    inputs: CompressInputs,
    table: SensitivityTable | None,
    plans: Sequence[Plan],
    emit: Emit = lambda event: None,
) -> tuple[FrontPoint, ...]:
    """Return the front with some plans among its points, smallest first; empty without scores."""
    allocator = inputs.settings.allocator
    if table is None or allocator in BLIND or not plans:
        return ()
    ledger = limit_file(inputs, 0)
    most = ledger.cost.file_bytes({u: _find_largest(row) for u, row in ledger.bytes_of.items()})
    least = ledger.count_bytes(ledger.find_smallest())
    found = {}
    for step in range(STEPS):
        emit(Progress(stage="front", done=step, total=STEPS))
        limit = least + (most - least) * step // (STEPS - 1)
        own = replace(ledger, budget=Budget(limit_bytes=limit, asked=f"{limit}B"))
        plan = allocate_within(inputs, allocator, table, own, _ignore)
        found[plan.predicted_bytes] = _make_point(inputs, table, plan)
    emit(Progress(stage="front", done=STEPS, total=STEPS))
    for plan in plans:
        if plan.predicted_loss is not None:
            found[plan.predicted_bytes] = _make_point(inputs, table, plan)
    return tuple(found[nbytes] for nbytes in sorted(found))


def _find_largest(row: Mapping[Candidate, int]) -> Candidate:
    """Return the largest option of a unit; a dense one only where it has no other."""
    packed = [candidate for candidate in row if not candidate.dense]
    return max(packed or row, key=lambda candidate: (row[candidate], candidate))


def _make_point(inputs: CompressInputs, table: SensitivityTable, plan: Plan) -> FrontPoint:
    assert plan.predicted_loss is not None, "there is a table"
    size = inputs.space.cost.make_size_report(plan.choices)
    return FrontPoint(
        nbytes=plan.predicted_bytes,
        bits=size.effective_bits,
        loss=plan.predicted_loss,
        uniform=_predict_baseline(inputs, table, plan.predicted_bytes),
    )


def _ignore(_event: Event) -> None:
    """Drop notices: those about the plans of a run were given when they were made."""
