"""The table that says how sure a difference is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cptq.report import words
from cptq.report.names import short_tasks
from cptq.report.table import Table
from cptq.types import PairedDifference


def paired_table(paired: Sequence[PairedDifference]) -> Table | None:
    """Differences to the baseline on the same samples, with intervals; None without any."""
    if not paired:
        return None
    tasks = short_tasks(row.task for row in paired)
    rows = [
        (
            tasks[row.task],
            row.metric,
            words.signed(row.difference, 3),
            words.signed(row.interval[0], 3),
            words.signed(row.interval[1], 3),
            p_words(row.p_value),
            row.verdict,
        )
        for row in paired
    ]
    return Table(
        title="Against the baseline, on the same samples",
        columns=("task", "metric", "difference", "from", "to", "p", "verdict"),
        rows=tuple(rows),
        right=("difference", "from", "to", "p"),
        note=_note(paired, tasks),
    )


def _note(paired: Sequence[PairedDifference], tasks: Mapping[str, str]) -> str:
    level = words.percent(paired[0].level)
    methods: dict[str, list[str]] = {}
    for row in paired:
        methods.setdefault(row.method, []).append(row.metric)
    how = [f"{', '.join(dict.fromkeys(names))}: {method}" for method, names in methods.items()]
    changed = [
        f"{tasks[row.task]} {row.metric}: {words.number(row.lost)} answers lost, "
        f"{words.number(row.gained)} gained of {words.number(row.samples)}"
        for row in paired
        if row.lost is not None
    ]
    means = f"from, to: {level} interval of the difference; undecided: too few samples to tell"
    return "; ".join([means, *how, *changed])


def p_words(value: float) -> str:
    """A p-value; what is below a thousandth is not told more exactly."""
    return "<0.001" if value < 0.001 else words.number(value, 2)
