"""Several models measured by the same tasks: the comparison as one value, and its tables.

The first model is the baseline. A model is on the size-quality (Pareto) front unless another model
is at most as large and at least as good, and strictly better in one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from cptq.report.formatting import (
    Table,
    format_bytes,
    format_number,
    format_p_value,
    format_signed,
    format_with_error,
    shorten_tasks,
)
from cptq.report.protocol import IN_DOMAIN, explain_in_domain, list_protocols, spell_in_domain
from cptq.report.summary import convert_to_plain
from cptq.types import EvalResult, Notice, PairedDifference

#: version of the layout of compare.json
SCHEMA = 1
#: tasks that measure cost, not quality
COSTS = ("size", "load", "memory", "speed")
#: marks the models on the front
FRONT = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """One model and its results.

    `weight_bytes` is the size of its weight files (None: not known), `effective_bits` the bits per
    compressed weight with scales (None: not an artifact).
    """

    name: str
    source: str
    kind: str
    parameters: int
    weight_bytes: int | None
    effective_bits: float | None
    results: tuple[EvalResult, ...]
    paired: tuple[PairedDifference, ...] = ()

    @property
    def file_bits(self) -> float | None:
        """Bits of the whole file per parameter."""
        known = self.weight_bytes is not None and self.parameters
        return 8 * (self.weight_bytes or 0) / self.parameters if known else None

    def find(self, task: str, metric: str) -> EvalResult | None:
        """Return the result of a task and metric, or None."""
        return next((r for r in self.results if (r.task, r.metric) == (task, metric)), None)

    def find_cost(self, task: str, *metrics: str) -> float | None:
        """Return the value of the first of these metrics that was measured."""
        results = (self.find(task, metric) for metric in metrics)
        return next((result.value for result in results if result is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """Result of `cptq compare`; `quality` is the (task, metric) that defines the front."""

    command_line: str
    models: tuple[ComparedModel, ...]
    quality: tuple[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    notices: tuple[Notice, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def baseline(self) -> ComparedModel:
        """The first model, with which the others are compared."""
        return self.models[0]

    def find_quality(self, model: ComparedModel) -> EvalResult | None:
        """Return a model's result of `quality`."""
        return model.find(*self.quality)

    @property
    def higher_is_better(self) -> bool:
        """Direction of `quality`."""
        results = [result for model in self.models if (result := self.find_quality(model))]
        return results[0].higher_is_better

    def is_on_front(self, model: ComparedModel) -> bool:
        """Whether no other model dominates this one (see `dominates`)."""
        points = {other.name: self._locate(other) for other in self.models}
        mine = points[model.name]
        others = [point for point in points.values() if point is not None]
        return mine is not None and not any(dominates(point, mine) for point in others)

    def _locate(self, model: ComparedModel) -> tuple[float, float] | None:
        """Return (bytes, loss), both better when lower; None if not known."""
        result = self.find_quality(model)
        if model.weight_bytes is None or result is None or not isfinite(result.value):
            return None
        sign = -1.0 if result.higher_is_better else 1.0
        return float(model.weight_bytes), sign * result.value

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for compare.json."""
        data = {item.name: convert_to_plain(getattr(self, item.name)) for item in fields(self)}
        for row, model in zip(data["models"], self.models, strict=True):
            row |= {"file_bits": model.file_bits, "on_front": self.is_on_front(model)}
            for paired, pair in zip(row["paired"], model.paired, strict=True):
                paired |= {"at_most_worse": pair.at_most_worse, "verdict": pair.verdict}
        return {"schema": SCHEMA, **data}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOutcome:
    """Return value of `compare`; `reports` maps "json", "html" and "svg" to files."""

    comparison: ModelComparison
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one (bytes, loss) is at most the other in both, and not equal to it."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def find_shared_quality(results: Sequence[Sequence[EvalResult]]) -> tuple[str, str] | None:
    """Return the first (task, metric) of quality that every model has, or None."""
    keys = [[(r.task, r.metric) for r in rows if r.task not in COSTS] for rows in results]
    return next((key for key in keys[0] if all(key in other for other in keys[1:])), None)


def build_comparison_tables(comparison: ModelComparison) -> Sequence[Table]:
    """Build all tables of a comparison in order; tables without rows are omitted."""
    notices = tuple((n.kind, n.subject, n.message) for n in comparison.notices)
    tables = [
        build_front_table(comparison),
        build_difference_table(comparison),
        build_cost_table(comparison),
        build_results_table(comparison),
        Table(title="Notices", columns=("kind", "subject", "message"), rows=notices),
    ]
    return [table for table in tables if table is not None and table.rows]


def build_front_table(comparison: ModelComparison) -> Table:
    """Build the table of sizes, bits and quality, with a mark on the front."""
    task, metric = comparison.quality
    found = [result for model in comparison.models if (result := comparison.find_quality(model))]
    marked, tasks = any(result.in_domain for result in found), shorten_tasks([task])
    better = "higher" if comparison.higher_is_better else "lower"
    rows = [
        (
            model.name,
            "-" if model.weight_bytes is None else format_bytes(model.weight_bytes),
            format_number(model.effective_bits, 3),
            format_number(model.file_bits, 3),
            _format_result(comparison.find_quality(model)),
            *([spell_in_domain(comparison.find_quality(model))] if marked else []),
            FRONT if comparison.is_on_front(model) else "",
        )
        for model in comparison.models
    ]
    return Table(
        title=f"Size and quality: {tasks[task]}",
        columns=(
            *("model", "weights", "bits", "file bits", metric),
            *((IN_DOMAIN,) if marked else ()),
            "front",
        ),
        rows=tuple(rows),
        right=("weights", "bits", "file bits", metric),
        note="; ".join(
            [
                f"{metric}: {better} is better, ± standard error",
                "bits: per compressed weight, with scales",
                "file bits: whole file over all parameters",
                f"{FRONT}: no other model is as small and as good",
                *list_protocols(found, tasks),
                *explain_in_domain(found),
            ]
        ),
    )


def build_difference_table(comparison: ModelComparison) -> Table | None:
    """Build the table of differences from the baseline on the same samples."""
    tasks = shorten_tasks(row.task for model in comparison.models for row in model.paired)
    rows = [
        (
            model.name,
            f"{tasks[row.task]} {row.metric}",
            format_signed(row.difference, 3),
            f"{format_signed(row.interval[0], 3)} to {format_signed(row.interval[1], 3)}",
            format_p_value(row.p_value),
            row.verdict,
        )
        for model in comparison.models
        for row in model.paired
    ]
    methods = dict.fromkeys(row.method for model in comparison.models for row in model.paired)
    return Table(
        title=f"Difference from {comparison.baseline.name} on the same samples",
        columns=("model", "metric", "difference", "95% interval", "p", "verdict"),
        rows=tuple(rows),
        right=("difference", "95% interval", "p"),
        note="; ".join([*methods, "undecided: too few samples to decide"]),
    )


def build_results_table(comparison: ModelComparison) -> Table | None:
    """Build the table of all quality results."""
    tasks = shorten_tasks(result.task for model in comparison.models for result in model.results)
    found = [
        (model.name, result)
        for model in comparison.models
        for result in model.results
        if result.task not in COSTS
    ]
    results = [result for _, result in found]
    marked = any(result.in_domain for result in results)
    rows = tuple(
        (
            *(name, tasks[result.task], result.metric, _format_result(result)),
            *([spell_in_domain(result)] if marked else []),
            result.unit,
        )
        for name, result in found
    )
    mark = (IN_DOMAIN,) if marked else ()
    return Table(
        title="All results",
        columns=("model", "task", "metric", "value", *mark, "unit"),
        rows=rows,
        right=("value",),
        note="; ".join([*list_protocols(results, tasks), *explain_in_domain(results)]),
    )


def build_cost_table(comparison: ModelComparison) -> Table | None:
    """Build the table of speed and memory; None if nothing was measured."""
    rows = tuple(
        (
            model.name,
            *(format_number(value, 3) for value in _find_speeds(model)),
            _format_optional_bytes(model.find_cost("memory", "peak_on_device", "peak_resident")),
            format_number(model.find_cost("load", "seconds_to_first_output"), 3),
        )
        for model in comparison.models
    )
    if all(set(row[1:]) == {"-"} for row in rows):
        return None
    right = ("prefill", "decode", "peak memory", "s to first")
    return Table(
        title="Speed and memory",
        columns=("model", *right),
        rows=rows,
        right=right,
        note="prefill (or forward pass, for models that do not decode) and decode: tokens per "
        "second; peak memory: of a fresh process; s to first: seconds to load and return the "
        "first output",
    )


def _format_result(result: EvalResult | None) -> str:
    return "-" if result is None else format_with_error(result.value, result.stderr)


def _find_speeds(model: ComparedModel) -> tuple[float | None, float | None]:
    return model.find_cost("speed", "prefill", "forward"), model.find_cost("speed", "decode")


def _format_optional_bytes(value: float | None) -> str:
    return "-" if value is None else format_bytes(int(value))
