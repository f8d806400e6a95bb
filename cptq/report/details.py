"""The tables that say how: the model, the text, every layer, every score, times and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cptq.report import words
from cptq.report.summary import Summary
from cptq.report.table import Table, pairs
from cptq.report.tally import layer_choices
from cptq.types import LayerSpec


def model_table(summary: Summary) -> Table:
    """Which model, and how it ran."""
    model = summary.model
    return pairs(
        "Model",
        [
            ("source", model.source),
            ("kind", f"{model.kind}, family {model.family}"),
            ("parameters", f"{model.parameters:,}"),
            ("blocks", model.blocks or None),
            ("stored as", model.dtype),
            ("dense weights", words.size_exact(model.dense_bytes)),
            ("sha256 of the weights", model.fingerprint),
            ("ran on", ", ".join(word for word in (summary.device, summary.dtype) if word)),
            ("seed", summary.seed),
        ],
    )


def calibration_table(summary: Summary) -> Table | None:
    """Which text calibrated."""
    record = summary.calibration
    if record is None:
        return None
    amount = f"{record.samples:,} samples of up to {record.seqlen:,}, {record.tokens:,} tokens"
    rows = [
        ("source", record.source),
        ("found at", record.origin),
        ("amount", amount),
        ("seed", record.seed),
        ("sha256 of the tokens", record.fingerprint),
        ("sha256 of the text", record.text_sha256),
        ("notes", "; ".join(record.notes)),
    ]
    return pairs("Calibration", rows)


def protocol_table(summary: Summary) -> Table | None:
    """What each result was measured on."""
    rows = [
        (
            f"{row.task} v{row.version}",
            row.metric,
            f"{row.samples:,}",
            "" if row.tokens is None else f"{row.tokens:,}",
            "" if row.seqlen is None else str(row.seqlen),
            f"{row.data_source or ''} {(row.data_sha256 or '')[:12]}".strip(),
            words.seconds(row.seconds),
            "; ".join(row.notes),
        )
        for row in summary.evaluation
    ]
    columns = ("task", "metric", "samples", "tokens", "seqlen", "data", "time", "notes")
    right = ("samples", "tokens", "seqlen", "time")
    table = Table(
        title="How it was evaluated", columns=columns, rows=tuple(rows), right=right, folded=True
    )
    return table if rows else None


def layer_table(summary: Summary) -> Table | None:
    """Every weight matrix of the model, and what became of it."""
    choices, results = layer_choices(summary), {row.name: row for row in summary.results}
    rows = []
    for layer in summary.layers:
        choice, result = choices.get(layer.name), results.get(layer.name)
        rows.append(
            (
                layer.name,
                layer.role,
                f"{layer.shape[0]} x {layer.shape[1]}",
                choice.label if choice else layer.dtype,
                "" if result is None else f"{result.nbytes:,}",
                "" if result is None else words.number(result.weight_error, 3),
                "" if result is None else words.number(result.output_error, 3),
                "; ".join([*_layer_notes(layer), *(result.notes if result else ())]),
            )
        )
    columns = (
        "layer",
        "role",
        "shape",
        "stored as",
        "bytes",
        "weight error",
        "output error",
        "notes",
    )
    right = ("shape", "bytes", "weight error", "output error")
    table = Table(title="All layers", columns=columns, rows=tuple(rows), right=right, folded=True)
    return table if rows else None


def _layer_notes(layer: LayerSpec) -> list[str]:
    tied = f"tied to {layer.tied_to}" if layer.tied_to else ""
    fused = f"fused as {layer.fused}" if layer.fused else ""
    return [note for note in (tied, fused, layer.reason or "") if note]


def score_table(summary: Summary) -> Table | None:
    """Every unit's own score of every metric."""
    tables = list(summary.sensitivity.values())
    if not tables:
        return None
    metrics = tuple(table.metric for table in tables)
    rows = tuple(
        (unit.name, unit.role, *(words.number(table.per_unit.get(unit.name)) for table in tables))
        for unit in summary.units
    )
    columns = ("unit", "role", *metrics)
    return Table(title="All scores", columns=columns, rows=rows, right=metrics, folded=True)


def run_tables(summary: Summary) -> list[Table]:
    """Times, settings and versions."""
    times = [(stage, words.seconds(value)) for stage, value in summary.timings.items()]
    total = [("together", words.seconds(sum(summary.timings.values())))] if len(times) > 1 else []
    made = [
        pairs("Times", [*times, *total]),
        pairs("Settings", _texts(summary.settings), folded=True),
        pairs("Versions", summary.versions.items(), folded=True),
    ]
    return [table for table in made if table.rows]


def _texts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _text(value)) for name, value in settings.items() if value is not None]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
