"""`analyze --validate`: compare the scores of each metric with measured divergences.

1. Ground truth: a sample of (unit, candidate) pairs, each compressed alone in the dense model, and
   the divergence that it causes. The scores of every metric are ranked against it.
2. Regret: the plan that each metric leads to at the same bytes, carried out on the whole model,
   beside the plan that needs no scores (`even`) and the plan of the measured divergences (`kl`).

Both are measured on held-out rows of the calibration source, which neither calibrated (`fit`) nor
were used by metrics that measure on held-out rows of their own (`choose`). Metrics and allocators
are used by name; only the plan that regret is counted from is known here.

Cost: half a forward pass of the held-out rows per pair, one per plan, and the rounding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from cptq.allocation.allocate import allocate, drop_sparse
from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import Ledger, build_ledger
from cptq.allocation.targets import check_target, parse_target, resolve_budget
from cptq.calibration.batches import choose_held_out_tokens, count_tokens, split_held_out
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.holdout import split_parts
from cptq.calibration.objective import choose_objective
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression import WITHOUT_ACTIVATIONS
from cptq.compression.trial_model import TrialModel
from cptq.config import GROUND_TRUTH, AnalyzeSettings
from cptq.numerics.standard_error import compute_standard_error
from cptq.report.formatting import format_seconds as spoken
from cptq.sensitivity.validation.pairs import choose_pairs, classify_depth, rank_depths
from cptq.sensitivity.validation.ranks import RESAMPLES, measure_agreement
from cptq.types import (
    Candidate,
    Emit,
    Event,
    Keep,
    Notice,
    Pair,
    Plan,
    PlanTrial,
    Progress,
    SensitivityTable,
    Unit,
    Validation,
)

#: regret is counted from the plan of this metric
REFERENCE = GROUND_TRUTH
#: the allocator that asks no score
BLIND_ALLOCATOR = "even"
#: what the truth is called beside the metrics
TRUTH = "measured truth"


def validate(
    model: LoadedModel,
    calibration: Calibration,
    tables: Mapping[str, SensitivityTable],
    candidates: Sequence[Candidate],
    cost: CostModel,
    ledgers: Sequence[Ledger],
    trial: TrialModel,
    settings: AnalyzeSettings,
    emit: Emit,
    keep: Keep,
) -> Validation:
    """Compare the tables with measured divergences; the model is left as it was.

    Args:
        cost: the bytes of the file that the runtime loads.
        ledgers: one per target, from `build_ledgers`.
        trial: gives units as the compressor stores them.
        keep: keeps what is measured: of each pair, and of each plan.

    Raises:
        CalibrationError: no held-out rows, or an output that is not finite.
    """
    _warn_of_foreign_texts(tables, calibration, emit)
    seed = settings.calibration.seed
    objective = choose_objective(model.kind, model.config)
    divergence = DivergenceFromDense(
        model, split_parts(model, calibration.held_out, 1)[0], objective
    )
    dealt = choose_pairs(model.units, len(model.block_names), candidates, settings.pairs, seed)
    chosen = [(unit, c) for unit, c in dealt if cost.explain_refusal(unit.name, c) is None]
    trials = _Trials(model=model, divergence=divergence, trial=trial, emit=emit, keep=keep)
    _report_cost(divergence, len(chosen), len(ledgers), tables, settings, candidates, model, emit)
    clock = time.perf_counter()
    pairs = _measure_pairs(model, divergence, trial, chosen, tables, emit, keep)
    paired = time.perf_counter()
    found = trials.run(ledgers, tables, candidates, settings.allocators)
    return Validation(
        unit=objective.unit,
        compressor=settings.compressor,
        seed=seed,
        judge_tokens=divergence.tokens,
        resamples=RESAMPLES,
        texts=_describe_texts(model, calibration, divergence),
        reference=REFERENCE if REFERENCE in tables else None,
        pairs=tuple(pairs),
        agreements=tuple(
            measure_agreement(
                name,
                [pair.unit for pair in pairs],
                [candidates.index(pair.candidate) for pair in pairs],
                [pair.scores[name] for pair in pairs],
                [pair.truth for pair in pairs],
                seconds=table.seconds,
                seed=seed,
            )
            for name, table in tables.items()
        ),
        depths=_rank_depths(pairs, list(tables)),
        trials=tuple(found),
        seconds={"pairs": paired - clock, "plans": time.perf_counter() - paired},
    )


def build_ledgers(
    cost: CostModel,
    candidates: Sequence[Candidate],
    vocabulary: Mapping[str, Sequence[Candidate]],
    settings: AnalyzeSettings,
) -> list[Ledger]:
    """Build the ledger of every target; `vocabulary`: the candidates of units outside the blocks.

    Raises:
        BudgetError: no plan reaches a target, or only plans with sparse weights do: the baseline
            plan has none.
    """
    rows = {unit.name: vocabulary.get(unit.name, candidates) for unit in cost.units}
    ledgers = []
    for text in settings.targets:
        target = parse_target(text)
        ledger = build_ledger(resolve_budget(target, cost, settings.group_size), cost, rows)
        plain = ledger
        if any(candidate.sparsity for candidate in candidates):
            plain = ledger.restrict({u: drop_sparse(row) for u, row in ledger.bytes_of.items()})
        check_target(target, plain, settings.group_size)
        ledgers.append(ledger)
    return ledgers


def _warn_of_foreign_texts(
    tables: Mapping[str, SensitivityTable], calibration: Calibration, emit: Emit
) -> None:
    """Warn where the text of an earlier analysis may hold the rows that are measured here."""
    ours = ("", calibration.record.fingerprint)
    foreign = [name for name, t in tables.items() if t.calibration_fingerprint not in ours]
    if foreign:
        message = (
            f"{', '.join(foreign)} come from an analysis of other calibration text, which may hold "
            "the rows that are measured here"
        )
        emit(Notice(kind="warning", subject="--validate", message=message))


def _measure_pairs(
    model: LoadedModel,
    divergence: DivergenceFromDense,
    trial: TrialModel,
    chosen: Sequence[tuple[Unit, Candidate]],
    tables: Mapping[str, SensitivityTable],
    emit: Emit,
    keep: Keep,
) -> list[Pair]:
    def measure(unit: Unit, candidate: Candidate) -> float:
        return divergence.measure_unit(unit, trial.weights(unit, candidate))

    found = []
    for index, (unit, candidate) in enumerate(chosen):
        emit(Progress(stage="truth", done=index, total=len(chosen), message=unit.name))
        found.append(
            Pair(
                unit=unit.name,
                candidate=candidate,
                depth=classify_depth(unit.block, len(model.block_names)),
                role=unit.role,
                truth=keep(f"pair-{index}", partial(measure, unit, candidate)),
                scores={metric: t.scores[unit.name][candidate] for metric, t in tables.items()},
            )
        )
    emit(Progress(stage="truth", done=len(chosen), total=len(chosen)))
    return found


def _rank_depths(pairs: Sequence[Pair], metrics: Sequence[str]) -> dict[str, Mapping[str, float]]:
    found = {TRUTH: rank_depths([(p.depth, p.role, p.candidate, p.truth) for p in pairs])}
    for metric in metrics:
        rows = [(p.depth, p.role, p.candidate, p.scores[metric]) for p in pairs]
        found[metric] = rank_depths(rows)
    return found


@dataclass(kw_only=True, eq=False)
class _Trials:
    """Plans, carried out one after the other on one model."""

    model: LoadedModel
    divergence: DivergenceFromDense
    trial: TrialModel
    emit: Emit
    keep: Keep
    known: dict[tuple[Candidate, ...], torch.Tensor] = field(default_factory=dict)

    def run(
        self,
        ledgers: Sequence[Ledger],
        tables: Mapping[str, SensitivityTable],
        candidates: Sequence[Candidate],
        allocators: Sequence[str],
    ) -> list[PlanTrial]:
        """Every allocator on every table at every target, after the one that asks no score."""
        ways: list[tuple[str, SensitivityTable | None]] = [(BLIND_ALLOCATOR, None)]
        ways += [(name, table) for table in tables.values() for name in allocators]
        total = len(ledgers) * len(ways)
        found: list[PlanTrial] = []
        with self.trial.restore_after():
            for ledger in ledgers:
                for name, table in ways:
                    words = f"{ledger.budget.asked} {table.metric if table else ''} {name}"
                    self.emit(Progress(stage="plans", done=len(found), total=total, message=words))
                    found.append(self._trial(name, table, ledger, candidates))
        self.emit(Progress(stage="plans", done=total, total=total))
        return found

    def _trial(
        self,
        allocator: str,
        table: SensitivityTable | None,
        ledger: Ledger,
        candidates: Sequence[Candidate],
    ) -> PlanTrial:
        plan = allocate(
            allocator,
            table,
            ledger,
            candidates,
            model_fingerprint=self.model.fingerprint,
            emit=self._pass_warnings,
        )
        rows = self._judge(plan)
        size = ledger.cost.make_size_report(plan.choices)
        return PlanTrial(
            target=ledger.budget.asked,
            metric=plan.metric,
            allocator=allocator,
            limit_bytes=ledger.bound_file_bytes(),
            file_bytes=size.file_bytes,
            effective_bits=size.effective_bits,
            divergence=float(rows.mean()),
            stderr=compute_standard_error(rows, self.divergence.window_R),
            choices=dict(plan.choices),
            notes=plan.notes,
        )

    def _judge(self, plan: Plan) -> torch.Tensor:
        """Divergence of each row; equal plans are measured once."""
        key = tuple(plan.choices.values())
        if key not in self.known:
            step = f"trial-{len(self.known)}"
            self.known[key] = self.keep(step, lambda: self._carry_out(plan))
        return self.known[key]

    def _carry_out(self, plan: Plan) -> torch.Tensor:
        self.trial.apply_choices(plan.choices)
        return self.divergence.measure_rows()

    def _pass_warnings(self, event: Event) -> None:
        """Pass on what is a warning; what a plan is like stands with its trial."""
        if not (isinstance(event, Notice) and event.kind == "info"):
            self.emit(event)


def _describe_texts(
    model: LoadedModel, calibration: Calibration, divergence: DivergenceFromDense
) -> dict[str, str]:
    record = calibration.record
    tokens = choose_held_out_tokens(model.parameters, model.device.type == "cpu")
    split = split_held_out(calibration.batches, model.kind, tokens)
    shared = " (too short a text: they are fitted on as well)" if split.overlap else ""
    return {
        "fit": f"{count_tokens(split.fit):,} tokens of {record.source}, {record.samples} samples",
        "choose": f"{count_tokens(split.held_out):,} tokens from the end of those samples, for "
        f"metrics that measure{shared}",
        "judge": f"{divergence.tokens:,} tokens of {len(calibration.held_out)} further samples of "
        f"{record.source}",
    }


def _report_cost(
    divergence: DivergenceFromDense,
    pairs: int,
    budgets: int,
    tables: Mapping[str, SensitivityTable],
    settings: AnalyzeSettings,
    candidates: Sequence[Candidate],
    model: LoadedModel,
    emit: Emit,
) -> None:
    """Report the expected time, and the reference metric's where it was not requested."""
    began = time.perf_counter()
    divergence.measure_rows()
    one = time.perf_counter() - began
    plans = budgets * (1 + len(tables) * len(settings.allocators))
    message = (
        f"{pairs} pairs and {plans} plans on {divergence.tokens:,} tokens: about "
        f"{spoken(one * (pairs / 2 + plans))} of forward passes"
    )
    if settings.compressor not in WITHOUT_ACTIVATIONS:
        message += f", and {settings.compressor} of every unit at each width that a plan gives it"
    emit(Notice(kind="info", subject="--validate", message=message))
    if REFERENCE not in tables:
        held = choose_held_out_tokens(model.parameters, model.device.type == "cpu")
        each = one / 2 * held / max(divergence.tokens, 1)
        whole = spoken(each * len(model.units) * len(candidates))
        message = (
            f"regret against the plan of measured divergences is not given: add --metric "
            f"{REFERENCE}, about {whole} more"
        )
        emit(Notice(kind="info", subject="--validate", message=message))
