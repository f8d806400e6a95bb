"""The tables of a validation: how well metrics rank, what their plans cost, which depths hurt."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.report import words
from cptq.report.table import Table, pairs
from cptq.types import Interval, PlanTrial, Validation

DEPTHS = ("first", "middle", "last")


def validation_tables(found: Validation | None) -> list[Table]:
    """All of them, the verdicts first."""
    if found is None:
        return []
    tables = [rank_table(found), pooled_table(found), plan_table(found), regret_table(found)]
    tables += [depth_table(found), text_table(found), size_table(found)]
    return [table for table in tables if table is not None and table.rows]


def rank_table(found: Validation) -> Table:
    """Correlation with the measured truth among pairs of one width, best first."""
    ranked = sorted(found.agreements, key=lambda row: -_finite(row.spearman_within.value))
    rows = tuple(
        (
            row.metric,
            interval(row.spearman_within),
            interval(row.kendall_within),
            words.seconds(row.seconds),
        )
        for row in ranked
    )
    return Table(
        title="How well scores rank units, within a width",
        columns=("metric", "Spearman", "Kendall", "measured in"),
        rows=rows,
        right=("measured in",),
        note=f"{len(found.pairs)} pairs of unit and width, each {found.compressor} alone in the "
        f"dense model, {found.judge_tokens:,} tokens; mean over the widths; 95% bootstrap "
        f"intervals, units drawn anew {found.resamples} times with all of their pairs; times are "
        "those of the whole run that measured the metric, with all other metrics measured in it",
    )


def pooled_table(found: Validation) -> Table:
    """The same over all widths, where every score does well."""
    rows = tuple(
        (row.metric, interval(row.spearman_pooled), interval(row.kendall_pooled))
        for row in found.agreements
    )
    return Table(
        title="The same, pooled over widths",
        columns=("metric", "Spearman", "Kendall"),
        rows=rows,
        note="any score that knows that fewer bits are worse does well here",
    )


def _finite(value: float) -> float:
    return value if value == value else -2.0


def interval(value: Interval) -> str:
    """`0.93 (0.88 to 0.96)`."""
    if value.value != value.value:
        return "-"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _targets(trials: Sequence[PlanTrial]) -> list[str]:
    return list(dict.fromkeys(trial.target for trial in trials))


def _names(trials: Sequence[PlanTrial]) -> list[str]:
    return list(dict.fromkeys(trial.name for trial in trials))


def blind(found: Validation, target: str) -> PlanTrial | None:
    """The plan of a target that asks no score."""
    return next((t for t in found.trials if t.target == target and t.metric is None), None)


def reference(found: Validation, target: str) -> PlanTrial | None:
    """The plan of a target that measured divergences lead to."""
    of = [t for t in found.trials if t.target == target and t.metric is not None]
    return next((t for t in of if t.metric == found.reference), None)


def plan_table(found: Validation) -> Table:
    """Divergence of the whole model by plan and target, and its ratio to the blind plan's."""
    targets = _targets(found.trials)
    known = {(trial.name, trial.target): trial for trial in found.trials}
    rows = []
    for name in _names(found.trials):
        cells = []
        for target in targets:
            trial, base = known.get((name, target)), blind(found, target)
            cells.append("-" if trial is None else _against(trial, base))
        rows.append((name, *cells))
    return Table(
        title="Whole models at the same bytes",
        columns=("plan", *targets),
        rows=tuple(rows),
        right=tuple(targets),
        note=f"{found.unit} to the dense model, {found.compressor}; in brackets as a multiple of "
        "even, which is uniform where a width fits and else two widths spread over depth",
    )


def _against(trial: PlanTrial, base: PlanTrial | None) -> str:
    value = words.number(trial.divergence, 3)
    if base is None or not base.divergence or trial is base:
        return value
    return f"{value} ({trial.divergence / base.divergence:.2f})"


def regret_table(found: Validation) -> Table | None:
    """How much worse than the plan of measured divergences; None where that is not known."""
    targets = [t for t in _targets(found.trials) if reference(found, t) is not None]
    known = {(trial.name, trial.target): trial for trial in found.trials}
    rows = []
    for name in _names(found.trials):
        cells = []
        for target in targets:
            trial, best = known.get((name, target)), reference(found, target)
            if trial is None or best is None:
                cells.append("-")
            else:
                cells.append(words.signed(trial.divergence - best.divergence, 3))
        rows.append((name, *cells))
    return Table(
        title=f"Regret against the plan of {found.reference}",
        columns=("plan", *targets),
        rows=tuple(rows) if targets else (),
        right=tuple(targets),
        note=f"{found.unit}; below zero: better than the plan of measured single divergences",
    )


def depth_table(found: Validation) -> Table:
    """Whether the ends are the sensitive ones, by the truth and by every metric."""
    rows = tuple(
        (name, *(f"{row[d]:.2f}" if d in row else "-" for d in DEPTHS))
        for name, row in found.depths.items()
    )
    return Table(
        title="Are the first and last 30% of the blocks the sensitive ones?",
        columns=("by", *(f"{d} 30%" if d != "middle" else "middle" for d in DEPTHS)),
        rows=rows,
        right=("first 30%", "middle", "last 30%"),
        note="geometric mean of score / average score of the same role and width; above 1: hurt "
        "more than average",
    )


def text_table(found: Validation) -> Table:
    """Which text did what."""
    times = [(f"time of {name}", words.seconds(value)) for name, value in found.seconds.items()]
    return pairs("Three texts", [*found.texts.items(), *times])


def size_table(found: Validation) -> Table:
    """The honest sizes of the plans."""
    rows = tuple(
        (
            trial.target,
            trial.name,
            f"{trial.file_bytes:,}",
            f"{trial.limit_bytes - trial.file_bytes:,}",
            f"{trial.effective_bits:.3f}",
            f"{words.number(trial.divergence)} ± {words.number(trial.stderr, 2)}",
            "; ".join(trial.notes),
        )
        for trial in found.trials
    )
    columns = ("target", "plan", "file bytes", "below budget", "bits with scales", found.unit)
    return Table(
        title="All plans",
        columns=(*columns, "notes"),
        rows=rows,
        right=columns[2:],
        folded=True,
    )
