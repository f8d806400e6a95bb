"""What was done in three sentences, and the model before and after with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cptq.report.formatting import (
    Table,
    format_bytes,
    format_number,
    format_percent,
    format_plural,
    format_seconds,
    format_signed,
    format_with_error,
)
from cptq.report.summary import Summary, count_widths, rank_units
from cptq.types import GuardMeasure, GuardQuality

Row = dict[str, Any]


def tell(summary: Summary) -> list[str]:
    """Return what was done: the size, the loss, and how it was reached."""
    if summary.command == "compress" and summary.size is not None:
        dropped = _tell_dropped(summary)
        return [_tell_size(summary), _tell_loss(summary.quality), _tell_way(summary), *dropped]
    if summary.command == "analyze":
        return _tell_analysis(summary)
    return _tell_evaluation(summary)


def _tell_size(summary: Summary) -> str:
    size = summary.size
    assert size is not None
    share = size.file_bytes / max(1, size.dense_file_bytes)
    return (
        f"Compressed, the weights take {format_bytes(size.file_bytes)}, {format_percent(share)} of "
        f"the {format_bytes(size.dense_file_bytes)} that they take at 16 bits each, with "
        f"{size.effective_bits:.2f} bits per compressible weight, scales included."
    )


def _tell_loss(quality: GuardQuality | None) -> str:
    if quality is None:
        return "What the model lost was not measured in this run; cptq eval measures it."
    words = "; ".join(_say(measure) for measure in quality.measures)
    text = f"{quality.tokens:,} tokens of {quality.source} that did not calibrate"
    return f"On {text} the compressed model differs from the dense one by this: {words}."


def _say(measure: GuardMeasure) -> str:
    low, high = measure.interval or (None, None)
    within = f" (95% interval {format_number(low, 3)} to {format_number(high, 3)})"
    if measure.dense is None:
        value = f"{measure.name} {format_number(measure.value, 3)} {measure.unit}"
        return value + (within if measure.interval else "")
    change = format_signed(measure.difference, 3)
    change += f", 95% interval {format_signed(low, 3)} to {format_signed(high, 3)}"
    value = f"{measure.name} {format_number(measure.dense)} before, {format_number(measure.value)}"
    return f"{value} after" + (f" (difference {change})" if measure.interval else "")


def _tell_way(summary: Summary) -> str:
    plan = summary.plan
    widths = ", ".join(
        f"{format_plural(row.layers, 'layer')} as {row.label}" for row in count_widths(summary)
    )
    if plan is None:
        return f"Layers: {widths}."
    by = f"{plan.allocator} from {plan.metric} scores" if plan.metric else plan.allocator
    return f"Target {plan.budget.asked} was planned by {by}: {widths}."


def _tell_dropped(summary: Summary) -> list[str]:
    found = summary.activation_sparsity
    if not found:
        return []
    asked = "" if found["share"] is None else f" at a share of {format_percent(found['share'])}"
    count = format_plural(len(found["rules"]), "linear")
    return [
        f"At run time {found['method']}{asked} drops inputs of {count}: "
        f"{format_percent(found['mean'])} of their products on {found['tokens']:,} calibration "
        "tokens. What the model lost includes that."
    ]


def _tell_analysis(summary: Summary) -> list[str]:
    tables = list(summary.sensitivity.values())
    count = format_plural(len(summary.units), "unit")
    names = ", ".join(table.metric for table in tables) or "no metric"
    first = f"The sensitivity of {count} to compression was measured by {names}."
    found = []
    for table in tables:
        ranked = rank_units(table, 1)
        found += [f"{ranked[0][0]} by {table.metric}"] if ranked else []
    second = f"Most sensitive: {'; '.join(found)}." if found else "No score is finite."
    spent = format_seconds(sum(summary.timings.values()))
    return [first, second, f"It took {spent} on {summary.device or 'this machine'}."]


def _tell_evaluation(summary: Summary) -> list[str]:
    results = summary.evaluation
    tasks = ", ".join(dict.fromkeys(row.task for row in results)) or "no task"
    count = format_plural(len(results), "result")
    first = f"The model was evaluated on {tasks}: {count}."
    if not summary.baseline:
        return [first, "It was measured alone, with no other model beside it."]
    worse = [pair for pair in summary.paired if pair.verdict == "worse"]
    second = (
        f"Of {format_plural(len(summary.paired), 'difference')} from the baseline "
        f"{len(worse)} are decided against the model."
    )
    return [first, f"The baseline is {summary.baseline_source or 'another model'}.", second]


def compare_before_after(summary: Summary) -> list[Row]:
    """Return rows of "what", "before", "after", "difference" and "interval" as numbers."""
    rows: list[Row] = []
    size = summary.size
    if size is not None and summary.command == "compress":
        gap = size.file_bytes - size.dense_file_bytes
        rows.append(_make_row(size.file, "bytes", size.dense_file_bytes, size.file_bytes, gap))
    for m in summary.quality.measures if summary.quality else ():
        rows.append(_make_row(m.name, m.unit, m.dense, m.value, m.difference, m.interval))
        rows[-1] |= {"before_stderr": m.dense_stderr, "after_stderr": m.stderr}
    return rows


def _make_row(
    what: str,
    unit: str,
    before: float | None,
    after: float,
    difference: float | None,
    interval: tuple[float, float] | None = None,
) -> Row:
    return {
        "what": what, "unit": unit, "before": before, "after": after,
        "difference": difference, "interval": None if interval is None else list(interval),
    }  # fmt: skip


def build_before_after_table(summary: Summary) -> Table | None:
    """Build the table of both models; None where nothing was compressed."""
    rows = [_format_row(row) for row in compare_before_after(summary)]
    if not rows:
        return None
    columns = ("measure", "before", "after", "difference", "95% interval", "unit")
    return Table(
        title="Before and after",
        columns=columns,
        rows=tuple(rows),
        right=columns[1:5],
        note=_explain(summary.quality),
        leading=True,
    )


def _format_row(row: Row) -> tuple[str, ...]:
    if row["unit"] == "bytes":
        cells = [f"{row[key]:,}" for key in ("before", "after")]
        return (row["what"], *cells, f"{row['difference']:+,}", "exact", "bytes")
    before = "" if row["before"] is None else format_with_error(row["before"], row["before_stderr"])
    after = format_with_error(row["after"], row["after_stderr"])
    change = "" if row["difference"] is None else format_signed(row["difference"], 3)
    return (row["what"], before, after, change, _format_interval(row), row["unit"])


def _format_interval(row: Row) -> str:
    if row["interval"] is None:
        return "not known"
    show = format_number if row["difference"] is None else format_signed
    low, high = (show(end, 3) for end in row["interval"])
    return f"{low} to {high}"


def _explain(quality: GuardQuality | None) -> str:
    if quality is None:
        return "The loss was not measured: --no-eval, or no text was left that did not calibrate"
    words: Sequence[str] = (
        f"{quality.source}, {quality.tokens:,} tokens that did not calibrate, {quality.rows:,} "
        f"outputs in {format_plural(quality.samples, quality.sample_name)}",
        "weight file before: at 16 bits per weight",
        "±: standard error over the text; the interval is of the difference where there is "
        "one, else of the value",
        "computed with the weights as stored and activations as they are",
        *(
            ["the same text decided between two plans, which flatters the result a little"]
            if quality.chose_plan
            else []
        ),
    )
    return "; ".join(words)
