"""What a command prints when it is done, in each of the three formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cptq.cli.console import Talk
from cptq.cli.show_compare import show_compare
from cptq.cli.sketch import sketch
from cptq.report.comparison import CompareOutcome
from cptq.report.formatting import Table, format_number, format_seconds, tabulate_pairs
from cptq.report.summary import (
    AnalyzeOutcome,
    CompressOutcome,
    EvalOutcome,
    Summary,
    convert_to_plain,
    group_notices,
    rank_units,
)
from cptq.report.tables import (
    build_evaluation_table,
    build_paired_table,
    build_size_table,
    build_top_table,
    build_width_table,
    describe_verification,
)
from cptq.report.validation import build_validation_tables
from cptq.types import SensitivityTable

Reported = AnalyzeOutcome | CompressOutcome | EvalOutcome
Outcome = Reported | CompareOutcome
TOP = 5
#: with more metrics than this, each has a line instead of a table
MANY = 4


def show(talk: Talk, outcome: Outcome) -> None:
    """Print the outcome as the format asks."""
    if isinstance(outcome, CompareOutcome):
        show_compare(talk, outcome)
    elif talk.shape == "json":
        talk.document(document(outcome))
    elif talk.shape == "quiet":
        for line in quiet_lines(outcome):
            talk.line(line)
    else:
        HUMAN[outcome.summary.command](talk, outcome)
        talk.table(last_table(outcome))


def document(outcome: Reported) -> dict[str, Any]:
    """The document of `--format json`."""
    found = {name: convert_to_plain(getattr(outcome, name)) for name in ("out", "reports")}
    summary = outcome.summary.to_dict()
    for result in [*summary["evaluation"], *summary["baseline"]]:
        del result["per_sample"]  # thousands of numbers, which are in the file
    return {"command": outcome.summary.command, **found, "summary": summary}


def quiet_lines(outcome: Reported) -> list[str]:
    """The path that was written; for eval the first number of each task, in order."""
    if isinstance(outcome, EvalOutcome):
        results = outcome.summary.evaluation
        first = {row.task: row for row in reversed(results)}
        return [repr(first[task].value) for task in dict.fromkeys(row.task for row in results)]
    return [str(outcome.out)]


def show_analyze(talk: Talk, outcome: Reported) -> None:
    """The most sensitive units by each metric, and each metric over the blocks."""
    summary = outcome.summary
    tables = list(summary.sensitivity.values())
    many = len(tables) > MANY
    talk.tables(
        [first_table(tables)] if many else [build_top_table(t, summary, TOP) for t in tables]
    )
    talk.tables([block_table(tables)])
    if summary.validation is not None:
        talk.tables(
            [table for table in build_validation_tables(summary.validation) if not table.folded]
        )


def first_table(tables: list[SensitivityTable]) -> Table:
    """The most sensitive unit by each metric, and what the metric takes on its own."""
    leaders = [next((unit for unit, _ in rank_units(table, 1)), "-") for table in tables]
    rows = tuple(
        (table.metric, leader, format_seconds(table.seconds))
        for table, leader in zip(tables, leaders, strict=True)
    )
    return Table(
        title="Most sensitive by each metric",
        columns=("metric", "unit", "measured in"),
        rows=rows,
        right=("measured in",),
        note="times are those of the whole run that measured the metric, with all other metrics "
        "measured in it; the report lists more units, with their scores",
    )


def block_table(tables: list[SensitivityTable]) -> Table:
    """A row of bars per metric, one bar a block."""
    rows = []
    for table in tables:
        blocks = sorted(table.per_block)
        bars, logs = sketch([table.per_block[block] for block in blocks])
        rows.append((table.metric, bars, "log" if logs else ""))
    ends = f" ({blocks[0]} to {blocks[-1]})" if tables and blocks else ""
    note = "log: the bars show the logarithm" if any(row[2] for row in rows) else ""
    return Table(
        title=f"Sensitivity over the blocks{ends}",
        columns=("", "bars", "scale"),
        rows=tuple(rows),
        note=note,
    )


def show_compress(talk: Talk, outcome: Reported) -> None:
    """Bytes, bits and widths; results, if there are any."""
    summary = outcome.summary
    talk.tables(
        [build_size_table(summary), build_width_table(summary), build_evaluation_table(summary)]
    )


def show_eval(talk: Talk, outcome: Reported) -> None:
    """The results beside the baseline."""
    summary = outcome.summary
    talk.tables([build_evaluation_table(summary), build_paired_table(summary.paired)])


HUMAN: Mapping[str, Callable[[Talk, Reported], None]] = {
    "analyze": show_analyze,
    "compress": show_compress,
    "eval": show_eval,
}


def last_table(outcome: Reported) -> Table:
    """Whether it holds, what was noticed, how long it took, where it lies."""
    summary = outcome.summary
    facts = summary.verification
    return tabulate_pairs(
        "Done",
        [
            ("verified", describe_verification(facts) if facts else None),
            ("notices", notice_words(summary)),
            ("time", format_seconds(sum(summary.timings.values())) if summary.timings else None),
            ("written to", outcome.out),
            ("report", outcome.reports.get("html") or outcome.reports.get("md")),
        ],
    )


def notice_words(summary: Summary) -> str:
    """`1 fallback, 2 skipped (listed in the report)`."""
    kinds = group_notices(summary.notices)
    counts = ", ".join(f"{format_number(len(found))} {kind}" for kind, found in kinds.items())
    return f"{counts} (the report lists them)" if counts else "none"
