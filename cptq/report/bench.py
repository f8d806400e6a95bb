"""What `cptq bench` measured: figures of several models with every repetition, as tables and JSON.

A figure's value is the median of its repetitions; a ratio divides it by that of the first model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptq.report.formatting import (
    Table,
    format_bytes,
    format_number,
    format_plural,
    format_seconds,
    shorten_names,
)
from cptq.report.summary import convert_to_plain
from cptq.types import Figure, Notice

SCHEMA = 1
#: name of a figure -> (unit, whether a larger one is better)
FIGURES: Mapping[str, tuple[str, bool]] = {
    "load": ("seconds", False),
    "first_token": ("seconds", False),
    "first_output": ("seconds", False),
    "prefill": ("tokens per second", True),
    "decode": ("tokens per second", True),
    "forward": ("sentences per second", True),
    "file": ("bytes", False),
    "loaded_memory": ("bytes", False),
    "used_memory": ("bytes", False),
    "peak_memory": ("bytes", False),
    "loaded_device_memory": ("bytes", False),
    "peak_device_memory": ("bytes", False),
}
#: longest name of a model in a table of 80 columns
LONGEST_NAME = 30
_ABSENT = "-"


def compute_spread(values: Sequence[float]) -> float | None:
    """Compute the range of repetitions as a share of their median; None of fewer than two."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if len(values) > 1 and middle else None


def compute_ratio(value: float | None, first: float | None) -> float | None:
    """Compute value / first; None where one is not known or not positive."""
    if value is None or first is None or value <= 0 or first <= 0:
        return None
    return value / first


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchedModel:
    """A model with its figures.

    Attributes:
        name: short, for tables.
        source: as it was given.
        kind: of model, such as "causal-lm".
        way: what computed: "generate", "own loop", "llama.cpp" or "forward pass".
        device: where.
        dtype: in which type; "as stored" for GGUF.
        import_bytes: resident memory of its process before the model was loaded, which is not in
            its figures of memory.
        figures: in the order of FIGURES.
    """

    name: str
    source: str
    kind: str
    way: str
    device: str
    dtype: str
    import_bytes: float
    figures: tuple[Figure, ...]

    def find(self, name: str, batch_size: int | None = None) -> float | None:
        """Return the median of a figure, or None if it was not measured."""
        known = (f for f in self.figures if (f.name, f.batch_size) == (name, batch_size))
        return next((figure.median for figure in known), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All models of a run, the first one first, and the conditions."""

    command_line: str
    models: tuple[BenchedModel, ...]
    prompt_tokens: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    repeats: int
    threads: int
    seed: int
    cpu: str
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    notices: tuple[Notice, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether the models write text; otherwise a forward pass was measured."""
        return self.models[0].kind == "causal-lm"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with medians, spreads and ratios beside the repetitions."""
        data: dict[str, Any] = convert_to_plain(self)
        for row, model in zip(data["models"], self.models, strict=True):
            row["figures"] = [self._describe(model, figure) for figure in model.figures]
        return {"schema": SCHEMA, **data}

    def _describe(self, model: BenchedModel, figure: Figure) -> dict[str, Any]:
        unit, higher = FIGURES[figure.name]
        first = self.models[0].find(figure.name, figure.batch_size)
        return {
            "name": figure.name,
            "batch_size": figure.batch_size,
            "unit": unit,
            "higher_is_better": higher,
            "median": figure.median,
            "spread": compute_spread(figure.values),
            "ratio_to_first": compute_ratio(figure.median, first),
            "values": list(figure.values),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOutcome:
    """Return value of `bench`; `out` is the JSON file, if one was written."""

    bench: Bench
    out: Path | None = None


def name_models(sources: Sequence[str]) -> list[str]:
    """Return short and distinct names; a long one keeps its end, where variants differ."""
    names = shorten_names(sources)
    kept = [name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}" for name in names]
    if len(set(kept)) == len(kept):
        return kept
    return [
        f"{index} …{name[-(LONGEST_NAME - 5) :]}" if len(name) > LONGEST_NAME else f"{index} {name}"
        for index, name in enumerate(names, start=1)
    ]


def build_bench_tables(bench: Bench) -> list[Table]:
    """Build tables of at most 80 columns: speed by batch size, the start, memory."""
    return [_build_speed_table(bench), _build_start_table(bench), *_build_memory_tables(bench)]


def _build_speed_table(bench: Bench) -> Table:
    names = ("prefill", "decode") if bench.generates else ("forward",)
    columns = names if bench.generates else ("sentences per second",)
    many = "tokens" if bench.generates else f"sentences of {bench.prompt_tokens} tokens"
    rows = tuple(
        (model.name, str(size), *(_spell(bench, model, name, size) for name in names))
        for size in bench.batch_sizes
        for model in bench.models
    )
    return Table(
        title=f"Speed: {many} per second, median of {format_plural(bench.repeats, 'repetition')}",
        columns=("model", "batch", *columns),
        rows=rows,
        right=("batch", *columns),
        note=_describe_conditions(bench),
    )


def _describe_conditions(bench: Bench) -> str:
    dtypes = ", ".join(dict.fromkeys(model.dtype for model in bench.models))
    devices = ", ".join(dict.fromkeys(model.device for model in bench.models))
    ways = ", ".join(dict.fromkeys(model.way for model in bench.models))
    lengths = f"prompt of {format_plural(bench.prompt_tokens, 'random token')}"
    if bench.generates:
        lengths += f", {bench.new_tokens} new tokens (decode: without the first)"
    spreads = [compute_spread(f.values) for m in bench.models for f in m.figures if f.batch_size]
    widest = max((spread for spread in spreads if spread is not None), default=None)
    noise = "" if widest is None else f"; repetitions differ by up to {widest:.0%} of their median"
    return (
        f"x: ratio to the first model; {lengths}; {format_plural(bench.threads, 'thread')} of "
        f"{bench.cpu}; {devices}, {dtypes}; by: {ways}{noise}"
    )


def _build_start_table(bench: Bench) -> Table:
    name, column = (
        ("first_token", "first token") if bench.generates else ("first_output", "first output")
    )
    rows = tuple(
        (
            model.name,
            *(_spell(bench, model, figure) for figure in ("file", "load")),
            _spell(bench, model, name, bench.batch_sizes[0]),
        )
        for model in bench.models
    )
    return Table(
        title="Start of a fresh process, measured once",
        columns=("model", "file", "load", column),
        rows=rows,
        right=("file", "load", column),
        note=f"{column}: after loading, at batch {bench.batch_sizes[0]}",
    )


def _build_memory_tables(bench: Bench) -> list[Table]:
    """Build the table of resident memory, and where a GPU was used that of its memory."""
    columns = {"after loading": "loaded_memory", "in use": "used_memory", "peak": "peak_memory"}
    note = (
        "beyond the process with the same imports and no model; weights that are mapped from the "
        "file count once they are used"
    )
    tables = [_build_memory_table(bench, "Resident memory", columns, note)]
    if any(model.find("peak_device_memory") is not None for model in bench.models):
        columns = {"after loading": "loaded_device_memory", "peak": "peak_device_memory"}
        tables.append(_build_memory_table(bench, "Memory of the device", columns))
    return tables


def _build_memory_table(
    bench: Bench, title: str, columns: Mapping[str, str], note: str = ""
) -> Table:
    rows = tuple(
        (model.name, *(_spell(bench, model, name) for name in columns.values()))
        for model in bench.models
    )
    return Table(
        title=title, columns=("model", *columns), rows=rows, right=tuple(columns), note=note
    )


def _spell(bench: Bench, model: BenchedModel, name: str, batch_size: int | None = None) -> str:
    """Return a figure and its ratio: `84.2 MB 0.31x`."""
    value = model.find(name, batch_size)
    if value is None:
        return _ABSENT
    unit = FIGURES[name][0]
    if unit == "bytes":
        text = format_bytes(round(value))
    else:
        text = format_seconds(value) if unit == "seconds" else format_number(value)
    ratio = compute_ratio(value, bench.models[0].find(name, batch_size))
    return f"{text} {format_ratio(ratio)}"


def format_ratio(ratio: float | None) -> str:
    """Return a ratio in five characters or more: `1.02x`, `12.3x`, ` 123x`; a dash for None."""
    if ratio is None:
        return f"{_ABSENT:>5}"
    digits = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{digits}f}x".rjust(5)
