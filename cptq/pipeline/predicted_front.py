"""The size-quality front of a measurement: plans of several sizes, with their predicted losses.

Both allocators, the run's own and the baseline (`even`), plan for a ladder of sizes from the
smallest plan to that of the largest packed options, and for the size of the plan that is carried
out. Each costs one allocation and no measurement. What is predicted is a sum of scores of single
units: interactions are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cptq.allocation import BLIND
from cptq.allocation.allocate import allocate
from cptq.allocation.ledger import Ledger, build_ledger
from cptq.allocation.problem import build_problem
from cptq.errors import BudgetError
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.uniform_check import BASELINE
from cptq.report.summary import FrontPoint
from cptq.types import Budget, Event, Plan, SensitivityTable

#: sizes of the ladder
STEPS = 8


def predict_front(
    inputs: CompressInputs, tables: Mapping[str, SensitivityTable], plan: Plan
) -> tuple[FrontPoint, ...]:
    """Return the points of both allocators, smallest first, that of `plan` marked.

    Empty where no scores were measured.
    """
    table = next(iter(tables.values()), None)
    allocator = inputs.settings.allocator
    if table is None or inputs.ledger is None or allocator in BLIND:
        return ()
    ledger = build_ledger(
        Budget(limit_bytes=0, asked="0B"), inputs.space.cost, inputs.space.options
    )
    problem = build_problem(table, ledger, inputs.space.candidates, _ignore)
    found = [
        FrontPoint(
            allocator=plan.allocator,
            nbytes=plan.predicted_bytes,
            loss=problem.predict_loss(plan.choices),
            chosen=True,
        )
    ]
    for limit in _list_sizes(ledger, plan.predicted_bytes):
        for name in (allocator, BASELINE):
            point = _predict(inputs, table, name, replace(ledger, budget=_limit(limit)))
            if point is not None and (point.allocator, point.nbytes) != (
                found[0].allocator,
                found[0].nbytes,
            ):
                found.append(point)
    distinct = dict.fromkeys(found)
    return tuple(sorted(distinct, key=lambda point: (point.nbytes, point.allocator)))


def _limit(nbytes: int) -> Budget:
    return Budget(limit_bytes=nbytes, asked=f"{nbytes}B")


def _list_sizes(ledger: Ledger, own: int) -> list[int]:
    least = ledger.count_bytes(ledger.find_smallest())
    largest = {
        unit: max([c for c in row if not c.dense] or row, key=lambda c: (row[c], c))
        for unit, row in ledger.bytes_of.items()
    }
    most = ledger.cost.file_bytes(largest)
    ladder = {least + (most - least) * step // (STEPS - 1) for step in range(STEPS)}
    return sorted(ladder | {own})


def _predict(
    inputs: CompressInputs, table: SensitivityTable, allocator: str, ledger: Ledger
) -> FrontPoint | None:
    """Return the point of an allocator within a limit; None where it has no plan there."""
    try:
        plan = allocate(
            allocator,
            table,
            ledger,
            inputs.space.candidates,
            model_fingerprint=inputs.model.fingerprint,
            emit=_ignore,
        )
    except BudgetError:
        return None
    if plan.predicted_loss is None:
        return None
    return FrontPoint(allocator=allocator, nbytes=plan.predicted_bytes, loss=plan.predicted_loss)


def _ignore(_event: Event) -> None:
    """Drop notices: those of the plan that is carried out were given when it was made."""
