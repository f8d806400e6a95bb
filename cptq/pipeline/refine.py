"""`compress --refine N`: improve a plan by measuring the whole model on held-out text.

Plans are tried on a trial model: units compressed by the run's own compressor on the dense model's
activations, each (unit, candidate) once. That is exact for rounding to nearest; for GPTQ it leaves
out that blocks see the errors of those before them, which the final compression then has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cptq.allocation.ledger import Ledger
from cptq.allocation.problem import build_problem
from cptq.allocation.refine import Choices, Refined, refine
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.trial_model import TrialModel
from cptq.config import CompressSettings
from cptq.pipeline.inputs import HeldOutText
from cptq.pipeline.trial_model import build_trial_model
from cptq.report.formatting import format_number
from cptq.types import Emit, Event, Notice, Plan, SensitivityTable


def refine_plan(
    model: LoadedModel,
    calibration: Calibration,
    held_out: HeldOutText,
    plan: Plan,
    table: SensitivityTable | None,
    ledger: Ledger,
    settings: CompressSettings,
    emit: Emit,
) -> Plan:
    """Return the plan after `settings.refine` measurements; the model is left as it was.

    Args:
        held_out: text to search by, and to guard the result with.
        ledger: the budget of the plan, and what the search can give each unit.
    """
    objective = choose_objective(model.kind, model.config)
    candidates = sorted({candidate for row in ledger.bytes_of.values() for candidate in row})
    seed = settings.calibration.seed
    trial = build_trial_model(
        model,
        calibration,
        settings.compressor,
        ledger.cost,
        candidates,
        seed=seed,
        emit=emit,
    )
    search = DivergenceFromDense(model, held_out.search, objective, units=False)
    guard = DivergenceFromDense(model, held_out.guard, objective, units=False)
    problem = build_problem(table, ledger, candidates, _ignore)
    with trial.restore_after():
        found = refine(
            problem,
            plan.choices,
            measure=_measure(trial, search),
            guard=_measure(trial, guard),
            evaluations=settings.refine,
            seed=seed,
            emit=emit,
        )
    note = _describe_result(found, objective.unit)
    emit(Notice(kind="info", subject="--refine", message=note))
    return replace(
        plan,
        choices=found.choices,
        predicted_bytes=ledger.cost.file_bytes(found.choices),
        predicted_loss=None if table is None else problem.predict_loss(found.choices),
        notes=(*plan.notes, f"refined: {note}"),
    )


def _measure(trial: TrialModel, divergence: DivergenceFromDense) -> Callable[[Choices], float]:
    def measure(choices: Choices) -> float:
        trial.apply_choices(choices)
        return float(divergence.measure_rows().mean())

    return measure


def _ignore(_event: Event) -> None:
    """What is to be said about the scores was said when the plan was made."""


def _describe_result(found: Refined, unit: str) -> str:
    if not found.kept:
        return (
            f"none of {found.tried} plans held on both texts; the plan stays "
            f"({format_number(found.before)} {unit})"
        )
    return (
        f"{found.kept} of {found.tried} swaps kept: {format_number(found.before)} to "
        f"{format_number(found.after)} {unit} on the text that chose, "
        f"{format_number(found.guard_before)} to {format_number(found.guard_after)} on a second"
    )
