"""Speed and memory of the dense model and of what `cptq compress` wrote, as a table."""

from __future__ import annotations

from cptq.report.bench import compute_ratio, compute_spread, format_ratio
from cptq.report.formatting import (
    Table,
    format_bytes,
    format_number,
    format_plural,
    tabulate_pairs,
)
from cptq.report.summary import Summary
from cptq.types import ModelSpeed, SpeedReport

TITLE = "Speed and memory"
NOT_MEASURED, ABSENT = "not measured", "-"


def build_speed_table(summary: Summary) -> Table | None:
    """Build the table; None where nothing was compressed."""
    found = summary.speed
    if found is None:
        return None
    if not found.models:
        return tabulate_pairs(
            TITLE, [(NOT_MEASURED, found.why), ("to measure them", found.command)]
        )
    names = [figure.name for figure in found.models[0].figures]
    columns = ("model", "weights", *names, "way")
    return Table(
        title=TITLE,
        columns=columns,
        rows=tuple(_build_row(model, found.models[0], names) for model in found.models),
        right=columns[1:-1],
        note=_explain(found),
        leading=True,
    )


def _build_row(model: ModelSpeed, first: ModelSpeed, names: list[str]) -> tuple[str, ...]:
    size = format_bytes(model.weight_bytes)
    cells = [f"{size} {format_ratio(compute_ratio(model.weight_bytes, first.weight_bytes))}"]
    medians = [{figure.name: figure.median for figure in each.figures} for each in (model, first)]
    for name in names:
        value, base = (known.get(name) for known in medians)
        ratio = format_ratio(compute_ratio(value, base))
        cells.append(ABSENT if value is None else f"{format_number(value)} {ratio}")
    return (model.name, *cells, model.way or ABSENT)


def _explain(found: SpeedReport) -> str:
    generates = bool(found.new_tokens)
    figures = [figure for model in found.models for figure in model.figures]
    widest = max((compute_spread(figure.values) or 0.0 for figure in figures), default=0.0)
    repeats = len(figures[0].values) if figures else 0
    speed = (
        f"prefill, decode: tokens per second of a prompt of {found.prompt_tokens} random tokens "
        f"and of {found.new_tokens - 1} new ones after the first"
        if generates
        else f"forward: sentences of {found.prompt_tokens} random tokens per second"
    )
    rounds = (
        f"median of {format_plural(repeats, 'repetition')} that differ by up to {widest:.0%}"
        if repeats > 1
        else "one repetition"
    )
    words = [
        "x: ratio to the dense model",
        "weights: bytes of parameters and buffers in memory, counted",
        speed,
        f"one sequence at a time, {rounds}",
        f"{format_plural(found.threads, 'thread')}, {found.device}, {found.dtype}",
        f"load times, resident memory and batches: {found.command}",
    ]
    if any(not model.way for model in found.models):
        words.append(
            "stock transformers multiplies packed weights out (counted in float32); its speed: "
            "cptq eval --task footprint"
        )
    return "; ".join(words)
