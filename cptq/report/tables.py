"""The tables that say what came out, and the order of all tables in a report."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.report import words
from cptq.report.details import (
    calibration_table,
    layer_table,
    model_table,
    protocol_table,
    run_tables,
    score_table,
)
from cptq.report.names import short_tasks
from cptq.report.paired import paired_table
from cptq.report.pruning import pruning_tables
from cptq.report.summary import Summary, VerificationFacts
from cptq.report.table import Table, pairs
from cptq.report.tally import left_alone, most_sensitive, notices_by_kind, widths
from cptq.report.validation import validation_tables
from cptq.types import EvalResult, SensitivityTable

TOP = 10
#: from here on, notices of kinds that changed no result are folded away
MANY_NOTICES = 30
CHANGED_THE_RESULT = ("warning", "fallback")


def size_table(summary: Summary) -> Table | None:
    """Bytes and the three averages of bits, each with what it counts."""
    size = summary.size
    if size is None:
        return None
    share = words.percent(size.file_bytes / size.dense_file_bytes) if size.dense_file_bytes else "-"
    rows = [
        ("weight file, dense", words.size_exact(size.dense_file_bytes)),
        ("weight file, compressed", f"{words.size_exact(size.file_bytes)}, {share} of dense"),
        *_budget_rows(summary, size.file_bytes),
        ("nominal bits", f"{size.nominal_bits:.3f} (codes alone)"),
        ("effective bits", f"{size.effective_bits:.3f} (compressible weights with their scales)"),
        ("whole-file bits", f"{size.file_bits:.3f} (whole file over all parameters)"),
        *_plan_rows(summary),
    ]
    return pairs("Size", rows)


def _budget_rows(summary: Summary, file_bytes: int) -> list[tuple[str, str]]:
    if summary.budget is None:
        return []
    limit = summary.budget.limit_bytes
    left = limit - file_bytes
    words_left = f"{left:,} bytes left" if left >= 0 else f"{-left:,} bytes above"
    return [("budget", f"{summary.budget.asked} = {limit:,} bytes, {words_left}")]


def _plan_rows(summary: Summary) -> list[tuple[str, str]]:
    plan = summary.plan
    if plan is None:
        return []
    by = f"{plan.allocator} on {plan.metric}" if plan.metric else plan.allocator
    loss = words.number(plan.predicted_loss) if plan.predicted_loss is not None else "not predicted"
    return [("plan", by), ("predicted loss", loss)]


def verification_words(facts: VerificationFacts) -> str:
    """One line on what the fresh process found."""
    lists = {
        "missing": facts.missing,
        "unexpected": facts.unexpected,
        "mismatched": facts.mismatched,
    }
    bad = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in lists.items() if names]
    keys = "; ".join(bad) if bad else "no missing, unexpected or mismatched key"
    if facts.max_abs_difference is None:
        return f"{keys}; outputs not compared"
    if facts.max_abs_difference == 0:
        return f"{keys}; outputs equal"
    return f"{keys}; outputs differ by at most {facts.max_abs_difference:.3g}"


def width_table(summary: Summary) -> Table | None:
    """Layers and weights per width."""
    rows = [
        (
            row.label,
            str(row.layers),
            words.count(row.weights),
            words.percent(row.share),
        )
        for row in widths(summary)
    ]
    if not rows:
        return None
    rest = [layer for layer in left_alone(summary) if layer.tied_to is None]
    if rest:
        weights = words.count(sum(layer.numel for layer in rest))
        rows.append(("outside the plan", str(len(rest)), weights, ""))
    return Table(
        title="Layers per width",
        columns=("stored as", "layers", "weights", "of planned"),
        rows=tuple(rows),
        right=("layers", "weights", "of planned"),
        note="w4g64: 4 bits, one scale per 64 inputs; c: one scale per output channel; w16: dense",
    )


def evaluation_table(summary: Summary) -> Table | None:
    """Results, beside the baseline where one was measured."""
    if not summary.evaluation:
        return None
    beside = bool(summary.baseline)
    rows, tasks = [], short_tasks(row.task for row in summary.evaluation)
    for row in summary.comparison.rows:
        cells = [tasks[row.result.task], row.result.metric, _with_error(row.result)]
        if beside:
            base = words.number(row.baseline.value) if row.baseline else "-"
            cells += [base, words.signed(row.difference, 3), row.verdict]
        rows.append((*cells, row.result.unit))
    extra = ("baseline", "difference", "") if beside else ()
    return Table(
        title="Evaluation",
        columns=("task", "metric", "value", *extra, "unit"),
        rows=tuple(rows),
        right=("value", "baseline", "difference"),
        note=f"Baseline: {summary.baseline_source}" if summary.baseline_source else "",
    )


def _with_error(result: EvalResult) -> str:
    error = f" ± {words.number(result.stderr, 2)}" if result.stderr is not None else ""
    return words.number(result.value) + error


def top_table(table: SensitivityTable, summary: Summary, count: int = TOP) -> Table:
    """The most sensitive units of one metric."""
    units = {unit.name: unit for unit in summary.units}
    rows = [
        (str(rank), name, units[name].role if name in units else "", words.number(score))
        for rank, (name, score) in enumerate(most_sensitive(table, count), start=1)
    ]
    return Table(
        title=f"Most sensitive by {table.metric}",
        columns=("#", "unit", "role", "score"),
        rows=tuple(rows),
        right=("#", "score"),
        note=f"{table.score_unit}; {_measured_on(table)}; {words.seconds(table.seconds)}",
    )


def _measured_on(table: SensitivityTable) -> str:
    return words.plural(table.tokens, "token") if table.tokens else "the weights alone"


def notice_tables(summary: Summary) -> list[Table]:
    """Every fallback, skipped layer and warning; long lists of what changed nothing are folded."""
    rows = [
        (kind, notice.subject, notice.message)
        for kind, found in notices_by_kind(summary.notices).items()
        for notice in found
    ]
    columns = ("kind", "about", "what")
    if len(rows) <= MANY_NOTICES:
        return [Table(title="Notices", columns=columns, rows=tuple(rows))]
    first = tuple(row for row in rows if row[0] in CHANGED_THE_RESULT)
    rest = tuple(row for row in rows if row[0] not in CHANGED_THE_RESULT)
    return [
        Table(title="Notices", columns=columns, rows=first, note=f"{len(rest)} more stand below"),
        Table(title="More notices", columns=columns, rows=rest, folded=True),
    ]


def all_tables(summary: Summary) -> Sequence[Table]:
    """All tables in the order of a report; the ones without rows left out."""
    found = [
        evaluation_table(summary),
        paired_table(summary.paired),
        size_table(summary),
        width_table(summary),
        *validation_tables(summary.validation),
        *notice_tables(summary),
        *(top_table(table, summary) for table in summary.sensitivity.values()),
        model_table(summary),
        calibration_table(summary),
        protocol_table(summary),
        *pruning_tables(summary),
        score_table(summary),
        layer_table(summary),
        *run_tables(summary),
    ]
    return [table for table in found if table is not None and table.rows]
