"""The tables of models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.report import words
from cptq.report.names import short_tasks
from cptq.report.paired import p_words
from cptq.report.side_by_side import COSTS, ComparedModel, SideBySide
from cptq.report.table import Table
from cptq.types import EvalResult

FRONT = "*"


def front_table(found: SideBySide) -> Table:
    """Size, bits, the quality that the front is drawn by, and who is on it."""
    task, metric = found.quality
    task = short_tasks([task])[task]
    better = "higher" if found.higher_is_better else "lower"
    rows = [
        (
            model.name,
            "-" if model.weight_bytes is None else words.size(model.weight_bytes),
            words.number(model.effective_bits, 3),
            words.number(model.file_bits, 3),
            with_error(found.measured(model)),
            FRONT if found.on_front(model) else "",
        )
        for model in found.models
    ]
    return Table(
        title=f"Size and quality: {task}",
        columns=("model", "weights", "bits", "file bits", metric, "front"),
        rows=tuple(rows),
        right=("weights", "bits", "file bits", metric),
        note=f"{metric}: {better} is better, ± standard error; bits: of compressed weights with "
        f"scales; file bits: whole file over all parameters; {FRONT}: no other model is as "
        "small and as good",
    )


def with_error(result: EvalResult | None) -> str:
    """`0.8601 ± 0.012`."""
    if result is None:
        return "-"
    error = "" if result.stderr is None else f" ± {words.number(result.stderr, 2)}"
    return words.number(result.value) + error


def difference_table(found: SideBySide) -> Table | None:
    """Every model against the first, on the same samples."""
    tasks = short_tasks(row.task for model in found.models for row in model.paired)
    rows = [
        (
            model.name,
            f"{tasks[row.task]} {row.metric}",
            words.signed(row.difference, 3),
            f"{words.signed(row.interval[0], 3)} to {words.signed(row.interval[1], 3)}",
            p_words(row.p_value),
            row.verdict,
        )
        for model in found.models
        for row in model.paired
    ]
    methods = dict.fromkeys(row.method for model in found.models for row in model.paired)
    return Table(
        title=f"Against {found.baseline.name}, on the same samples",
        columns=("model", "what", "difference", "95% interval", "p", "verdict"),
        rows=tuple(rows),
        right=("difference", "95% interval", "p"),
        note="; ".join([*methods, "undecided: too few samples to tell"]),
    )


def results_table(found: SideBySide) -> Table | None:
    """All that was measured of quality."""
    tasks = short_tasks(result.task for model in found.models for result in model.results)
    rows = tuple(
        (model.name, tasks[result.task], result.metric, with_error(result), result.unit)
        for model in found.models
        for result in model.results
        if result.task not in COSTS
    )
    columns = ("model", "task", "metric", "value", "unit")
    return Table(title="All results", columns=columns, rows=rows, right=("value",))


def cost_table(found: SideBySide) -> Table | None:
    """Speed and memory of each; None where nothing was measured."""
    rows = tuple(
        (
            model.name,
            *(words.number(value, 3) for value in _speeds(model)),
            _bytes(model.cost("memory", "peak_on_device", "peak_resident")),
            words.number(model.cost("load", "seconds_to_first_output"), 3),
        )
        for model in found.models
    )
    if all(set(row[1:]) == {"-"} for row in rows):
        return None
    right = ("prefill", "decode", "peak memory", "s to first")
    return Table(
        title="Speed and memory",
        columns=("model", *right),
        rows=rows,
        right=right,
        note="tokens per second, of reading (of a forward where nothing is decoded) and of "
        "writing; peak memory of a fresh process; seconds to load and give the first output",
    )


def _speeds(model: ComparedModel) -> tuple[float | None, float | None]:
    return model.cost("speed", "prefill", "forward"), model.cost("speed", "decode")


def _bytes(value: float | None) -> str:
    return "-" if value is None else words.size(int(value))


def side_tables(found: SideBySide) -> Sequence[Table]:
    """All tables that have rows."""
    made = [front_table(found), difference_table(found), cost_table(found), results_table(found)]
    notices = tuple((n.kind, n.subject, n.message) for n in found.notices)
    made.append(Table(title="Notices", columns=("kind", "about", "what"), rows=notices))
    return [table for table in made if table is not None and table.rows]
