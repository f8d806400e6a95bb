"""An allocation problem, checked: units, options with bytes and scores, a limit.

Scores of a metric are noisy, and now and then a smaller option scores better than a larger one of
the same unit. All allocators assume that more bytes are never worse, so scores are first replaced
by their running minimum over bytes, and that this happened is said. Between bits and sparsity there
is no such order: an option that loses to a smaller one of another kind is left out instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cptq.allocation.ledger import Ledger
from cptq.errors import PlanError
from cptq.types import Candidate, Emit, Notice, SensitivityTable

#: relative excess over a smaller option's score that is rounding and not worth a word
_NOISE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to store one unit: an upper bound of its bytes, and its score."""

    candidate: Candidate
    nbytes: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an allocator sees.

    `options` of a unit have increasing bytes and scores that never increase. `per_unit` is the
    metric's candidate-free number; empty where there is no table.
    """

    ledger: Ledger
    candidates: tuple[Candidate, ...]
    options: Mapping[str, tuple[Option, ...]]
    per_unit: Mapping[str, float] = field(default_factory=dict)

    def smallest(self) -> dict[str, int]:
        """Every unit at its first option."""
        return dict.fromkeys(self.options, 0)

    def candidates_of(self, picks: Mapping[str, int]) -> dict[str, Candidate]:
        """Option numbers as candidates."""
        return {unit: self.options[unit][pick].candidate for unit, pick in picks.items()}

    def picks_of(self, choices: Mapping[str, Candidate]) -> dict[str, int]:
        """Candidates as option numbers; one that takes equal bytes stands for another."""
        sizes = self.ledger.bytes_of
        return {
            unit: next(i for i, o in enumerate(row) if o.nbytes == sizes[unit][choices[unit]])
            for unit, row in self.options.items()
        }

    def level(self, unit: str, candidate: Candidate) -> int:
        """The option number of a candidate, or of the nearest below that the unit may have.

        A unit that may have nothing as small gets its smallest.
        """
        size = self.ledger.bytes_of[unit].get(candidate)
        row = self.options[unit]
        if size is not None:
            below = [i for i, option in enumerate(row) if option.nbytes <= size]
        else:
            below = [i for i, option in enumerate(row) if option.candidate.bits <= candidate.bits]
        return max(below, default=0)

    def at_level(self, candidate: Candidate) -> dict[str, Candidate]:
        """Every unit at one candidate, or at the nearest it may have."""
        return {
            unit: candidate
            if candidate in self.ledger.bytes_of[unit]
            else row[self.level(unit, candidate)].candidate
            for unit, row in self.options.items()
        }

    def total(self, picks: Mapping[str, int]) -> int:
        """Upper bound of a plan's bytes."""
        chosen = sum(self.options[unit][pick].nbytes for unit, pick in picks.items())
        return self.ledger.base + chosen

    def fits(self, picks: Mapping[str, int]) -> bool:
        """Whether a plan keeps the limit, exactly."""
        return self.ledger.fits(self.candidates_of(picks), self.total(picks))

    def loss(self, picks: Mapping[str, int]) -> float:
        """Sum of the scores, free of rounding."""
        return math.fsum(self.options[unit][pick].score for unit, pick in picks.items())

    def predicted_loss(self, choices: Mapping[str, Candidate]) -> float:
        """As `loss`, for candidates; of two that take equal bytes the better score counts."""
        return self.loss(self.picks_of(choices))

    def restricted(self, kept: Mapping[str, Sequence[int]]) -> Problem:
        """The problem with only some options of each unit, and a ledger that is tighter for it."""
        options = {unit: [self.options[unit][i] for i in rows] for unit, rows in kept.items()}
        ledger = self.ledger.restricted(
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
class Solution:
    """What an allocator returns: a candidate for every unit, and what to say about it."""

    choices: Mapping[str, Candidate]
    notes: tuple[str, ...] = ()


Allocator = Callable[[Problem, Emit], Solution]


def build_problem(
    table: SensitivityTable | None, ledger: Ledger, candidates: Sequence[Candidate], emit: Emit
) -> Problem:
    """Check a table against the units and candidates, and make its scores monotone.

    A unit's options are those that the ledger has bytes of. One with a single option has nothing
    to choose: where the table knows no score of it, it counts as 0, and that is said.

    Raises:
        PlanError: a unit or a candidate has no score, or one that is not finite.
    """
    options, mended = {}, {}
    for unit, sizes in ledger.bytes_of.items():
        scores = _scores(table, unit, list(sizes), emit)
        raw = sorted(
            (Option(candidate=c, nbytes=sizes[c], score=scores[c]) for c in sizes),
            key=lambda option: (option.nbytes, option.score, option.candidate),
        )
        options[unit], excess = _monotone(raw)
        if excess > 0:
            mended[unit] = excess
    _report_refused(ledger, candidates, emit)
    if table is not None and mended:
        _report_mended(table.metric, mended, len(options), emit)
    return Problem(
        ledger=ledger,
        candidates=tuple(candidates),
        options=options,
        per_unit={} if table is None else table.per_unit,
    )


def _report_refused(ledger: Ledger, candidates: Sequence[Candidate], emit: Emit) -> None:
    """Units that can have less than was offered, by reason."""
    offered = [c for c in candidates if not c.dense]
    reasons: dict[str, list[str]] = {}
    for unit, sizes in ledger.bytes_of.items():
        refused = {ledger.cost.refusal(unit, c): c for c in offered}
        dense = all(c.dense for c in sizes)
        lead = "kept dense" if dense else "without one of --sparsity"
        for why, candidate in refused.items():
            if why is not None and (dense or candidate.sparsity):
                reasons.setdefault(f"{lead}: {why}", []).append(unit)
    for why, units in reasons.items():
        some = ", ".join(units[:3]) + (f" and {len(units) - 3} more" if len(units) > 3 else "")
        emit(Notice(kind="skipped", subject=some, message=why))


def _scores(
    table: SensitivityTable | None, unit: str, candidates: Sequence[Candidate], emit: Emit
) -> Mapping[Candidate, float]:
    if table is None:
        return dict.fromkeys(candidates, 0.0)
    if len(candidates) == 1 and candidates[0] not in table.scores.get(unit, {}):
        message = f"has no score at {candidates[0].label}, so it is not in the predicted loss"
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


def _monotone(raw: Sequence[Option]) -> tuple[tuple[Option, ...], float]:
    """The running minimum of the scores; of equal bytes only the best. And the largest excess."""
    kept: list[Option] = []
    excess = 0.0
    for option in raw:
        if kept and option.nbytes == kept[-1].nbytes:
            continue
        best = min(option.score, kept[-1].score) if kept else option.score
        if option.score - best > _NOISE * max(abs(best), abs(option.score)):
            if not _coarser(kept[-1].candidate, option.candidate):
                continue
            excess = max(excess, option.score - best)
        kept.append(Option(candidate=option.candidate, nbytes=option.nbytes, score=best))
    return tuple(kept), excess


def _coarser(smaller: Candidate, larger: Candidate) -> bool:
    """Whether all that the smaller can hold the larger can too, whatever a score says.

    A share of zeros anywhere may be such as 2:4 cannot have, and not the other way round.
    """
    freer = not larger.sparsity or ":" in smaller.pattern or smaller.pattern == larger.pattern
    return smaller.bits <= larger.bits and smaller.sparsity >= larger.sparsity and freer


def _report_mended(metric: str, mended: Mapping[str, float], units: int, emit: Emit) -> None:
    worst = max(mended, key=lambda unit: mended[unit])
    emit(
        Notice(
            kind="warning",
            subject=metric,
            message=f"{len(mended)} of {units} units scored worse with more bytes somewhere (most "
            f"in {worst}, by {mended[worst]:.3g}); there the better score of the smaller option "
            "is used",
        )
    )
