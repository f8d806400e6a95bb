"""An allocation problem, checked: units, options with bytes and scores, a budget.

Scores of a metric are noisy, and sometimes a smaller option scores better than a larger one of the
same unit. All allocators assume that more bytes are never worse, so scores are first replaced by
their running minimum over bytes, and a notice reports it. Between bits and sparsity there is no
such order: an option that loses to a smaller one of another kind is left out instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cptq.allocation.ledger import Ledger
from cptq.errors import PlanError
from cptq.types import SUPER_SCALES, Candidate, Emit, Notice, SensitivityTable

#: an excess over a smaller option's score, relative to it, that is rounding and not reported
_NOISE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to store one unit: an upper bound of its bytes, and its score."""

    candidate: Candidate
    nbytes: int
    score: float


@dataclass(frozen=True, kw_only=True)
class AllocationProblem:
    """The input of an allocator.

    `options` of a unit have increasing bytes and scores that never increase. `candidates` are
    those offered to all units. `per_unit` is the metric's number of a unit, independent of the
    candidate; empty without a table. A plan is written either as choices, {unit: candidate}, or
    as picks, {unit: index of its option}.
    """

    ledger: Ledger
    candidates: tuple[Candidate, ...]
    options: Mapping[str, tuple[Option, ...]]
    per_unit: Mapping[str, float] = field(default_factory=dict)

    def pick_smallest(self) -> dict[str, int]:
        """Return the picks of the smallest plan: every unit at its first option."""
        return dict.fromkeys(self.options, 0)

    def to_choices(self, picks: Mapping[str, int]) -> dict[str, Candidate]:
        """Convert picks to choices."""
        return {unit: self.options[unit][pick].candidate for unit, pick in picks.items()}

    def to_picks(self, choices: Mapping[str, Candidate]) -> dict[str, int]:
        """Convert choices to picks; of candidates that take equal bytes one is an option."""
        sizes = self.ledger.bytes_of
        return {
            unit: next(i for i, o in enumerate(row) if o.nbytes == sizes[unit][choices[unit]])
            for unit, row in self.options.items()
        }

    def find_level(self, unit: str, candidate: Candidate) -> int:
        """Return the pick of a candidate, or of the nearest below that the unit can have.

        A unit that can have nothing as small gets its smallest option.
        """
        size = self.ledger.bytes_of[unit].get(candidate)
        row = self.options[unit]
        if size is not None:
            below = [i for i, option in enumerate(row) if option.nbytes <= size]
        else:
            below = [i for i, option in enumerate(row) if option.candidate.bits <= candidate.bits]
        return max(below, default=0)

    def assign_all(self, candidate: Candidate) -> dict[str, Candidate]:
        """Return the choices with every unit at one candidate, or at the nearest it can have."""
        return {
            unit: candidate
            if candidate in self.ledger.bytes_of[unit]
            else row[self.find_level(unit, candidate)].candidate
            for unit, row in self.options.items()
        }

    def sum_bytes(self, picks: Mapping[str, int]) -> int:
        """Return the upper bound of a plan's bytes."""
        chosen = sum(self.options[unit][pick].nbytes for unit, pick in picks.items())
        return self.ledger.base + chosen

    def fits(self, picks: Mapping[str, int]) -> bool:
        """Return whether a plan keeps the limit, exactly."""
        return self.ledger.fits(self.to_choices(picks), self.sum_bytes(picks))

    def sum_scores(self, picks: Mapping[str, int]) -> float:
        """Return the sum of the scores, free of rounding errors."""
        return math.fsum(self.options[unit][pick].score for unit, pick in picks.items())

    def predict_loss(self, choices: Mapping[str, Candidate]) -> float:
        """Return `sum_scores` of choices; of candidates of equal bytes the better score counts."""
        return self.sum_scores(self.to_picks(choices))

    def restrict(self, kept: Mapping[str, Sequence[int]]) -> AllocationProblem:
        """Return the problem with some of each unit's options, and a ledger of less slack."""
        options = {unit: [self.options[unit][i] for i in rows] for unit, rows in kept.items()}
        ledger = self.ledger.restrict(
            {unit: [option.candidate for option in row] for unit, row in options.items()}
        )
        sizes = ledger.bytes_of
        return replace(
            self,
            ledger=ledger,
            options={
                unit: tuple(replace(o, nbytes=sizes[unit][o.candidate]) for o in row)
                for unit, row in options.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class AllocationSolution:
    """The output of an allocator: a candidate for every unit, and notes for the reader."""

    choices: Mapping[str, Candidate]
    notes: tuple[str, ...] = ()


Allocator = Callable[[AllocationProblem, Emit], AllocationSolution]


def build_problem(
    table: SensitivityTable | None, ledger: Ledger, candidates: Sequence[Candidate], emit: Emit
) -> AllocationProblem:
    """Check a table against the units and candidates, and make its scores monotone.

    A unit's options are those that the ledger lists. A unit with a single option needs no score:
    where the table has none it counts as 0, and a notice reports it.

    Raises:
        PlanError: a unit or a candidate has no score, or a score is not finite.
    """
    options, corrected = {}, {}
    for unit, sizes in ledger.bytes_of.items():
        scores = _read_scores(table, unit, list(sizes), emit)
        raw = sorted(
            (Option(candidate=c, nbytes=sizes[c], score=scores[c]) for c in sizes),
            key=lambda option: (option.nbytes, option.score, option.candidate),
        )
        options[unit], excess = _make_monotone(raw)
        if excess > 0:
            corrected[unit] = excess
    report_refused(ledger, candidates, emit)
    if table is not None and corrected:
        _report_corrected(table.metric, corrected, len(options), emit)
    return AllocationProblem(
        ledger=ledger,
        candidates=tuple(candidates),
        options=options,
        per_unit={} if table is None else _fill_per_unit(table, ledger),
    )


def _fill_per_unit(table: SensitivityTable, ledger: Ledger) -> dict[str, float]:
    """Return the metric's numbers; a unit outside the blocks, which has none, gets their mean."""
    mean = sum(table.per_unit.values()) / max(len(table.per_unit), 1)
    outer = {unit.name: mean for unit in ledger.cost.units if unit.block is None}
    return {**outer, **table.per_unit}


def report_refused(ledger: Ledger, candidates: Sequence[Candidate], emit: Emit) -> None:
    """Report the units for which candidates were refused, by reason."""
    offered = [c for c in candidates if not c.dense]
    reasons: dict[str, list[str]] = {}
    for unit, sizes in ledger.bytes_of.items():
        refused = {ledger.cost.explain_refusal(unit, c): c for c in offered}
        dense = all(c.dense for c in sizes)
        for why, candidate in refused.items():
            supers = candidate.scales == SUPER_SCALES
            left = "some --sparsity left out" if candidate.sparsity else "some --bits left out"
            lead = "kept dense" if dense else left
            if why is not None and (dense or candidate.sparsity or supers):
                reasons.setdefault(f"{lead}: {why}", []).append(unit)
    for why, units in reasons.items():
        names = ", ".join(units[:3]) + (f" and {len(units) - 3} more" if len(units) > 3 else "")
        emit(Notice(kind="skipped", subject=names, message=why))


def _read_scores(
    table: SensitivityTable | None, unit: str, candidates: Sequence[Candidate], emit: Emit
) -> Mapping[Candidate, float]:
    if table is None:
        return dict.fromkeys(candidates, 0.0)
    if len(candidates) == 1 and candidates[0] not in table.scores.get(unit, {}):
        message = f"has no score at {candidates[0].label}; the predicted loss does not count it"
        emit(Notice(kind="info", subject=unit, message=message))
        return {candidates[0]: 0.0}
    row = table.scores.get(unit)
    if row is None:
        raise PlanError(
            f"the {table.metric} measurement has no scores for {unit!r}",
            hint="measure this model again with cptq analyze",
        )
    for candidate in candidates:
        _check_score(table.metric, unit, candidate, row.get(candidate))
    return row


def _check_score(metric: str, unit: str, candidate: Candidate, score: float | None) -> None:
    if score is None:
        raise PlanError(
            f"the {metric} measurement has no score for {unit!r} at {candidate.label}",
            hint="measure again with the same --bits and --group-size",
        )
    if not math.isfinite(score):
        raise PlanError(f"the {metric} score of {unit!r} at {candidate.label} is {score}")


def _make_monotone(raw: Sequence[Option]) -> tuple[tuple[Option, ...], float]:
    """Replace scores by their running minimum; of equal bytes keep only the best.

    Args:
        raw: one unit's options by increasing bytes.

    Returns:
        The options kept, and the largest amount by which a score was lowered.
    """
    kept: list[Option] = []
    excess = 0.0
    for option in raw:
        if kept and option.nbytes == kept[-1].nbytes:
            continue
        best = min(option.score, kept[-1].score) if kept else option.score
        if option.score - best > _NOISE * max(abs(best), abs(option.score)):
            if not _is_coarser(kept[-1].candidate, option.candidate):
                continue
            excess = max(excess, option.score - best)
        kept.append(Option(candidate=option.candidate, nbytes=option.nbytes, score=best))
    return tuple(kept), excess


def _is_coarser(smaller: Candidate, larger: Candidate) -> bool:
    """Return whether `larger` can represent everything that `smaller` can.

    Unstructured zeros are not always representable as 2:4, while the reverse holds.
    """
    freer = not larger.sparsity or ":" in smaller.pattern or smaller.pattern == larger.pattern
    return smaller.bits <= larger.bits and smaller.sparsity >= larger.sparsity and freer


def _report_corrected(metric: str, corrected: Mapping[str, float], units: int, emit: Emit) -> None:
    worst = max(corrected, key=lambda unit: corrected[unit])
    emit(
        Notice(
            kind="warning",
            subject=metric,
            message=f"{len(corrected)} of {units} units scored worse with more bytes (most in "
            f"{worst}, by {corrected[worst]:.3g}); the better score of the smaller option is used "
            "there",
        )
    )
