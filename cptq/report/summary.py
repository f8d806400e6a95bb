"""The summary of a run as one immutable value: the only input of a report.

A `Summary` holds plain values of `cptq.types`, so reports are written, read back and compared
without torch. Stages that did not run leave their field empty. The functions below
compute counts and comparisons that all renderings and the command line share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from cptq.types import (
    Artifact,
    Budget,
    CalibrationRecord,
    Candidate,
    Comparison,
    EvalResult,
    GuardQuality,
    LayerResult,
    LayerSpec,
    Notice,
    PairedDifference,
    Plan,
    SensitivityTable,
    SizeReport,
    SpeedReport,
    Unit,
    Validation,
)

#: version of the layout of report.json; grows when a field changes its meaning or is removed
SCHEMA = 1
#: kinds of notices in the order shown: those that changed the result first
NOTICE_ORDER = ("warning", "fallback", "skipped", "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model of a run. `parameters` counts tied weights once; `dtype` is the storage type."""

    source: str
    kind: str
    family: str
    parameters: int
    dense_bytes: int
    fingerprint: str
    blocks: int = 0
    dtype: str = ""
    quantized: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationFacts:
    """Result of the reload check: the written artifact loaded in a fresh process.

    `max_abs_difference` compares its outputs with those of the compressed model in memory.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    max_abs_difference: float | None = None
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether no key is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """Two plans within as many bytes: `loss` of the allocator's, `uniform` of the baseline's.

    `bits` are the effective ones. Losses are predicted, in the metric's unit.
    """

    nbytes: int
    bits: float
    loss: float
    uniform: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything a report contains. Field names give the units: bytes, seconds.

    `activations`: how packed weights were multiplied, "exact" or "8bit"; empty if there are none.
    `activation_sparsity`: which inputs are dropped at run time (`ActivationRecord.to_dict`).
    """

    command: str
    command_line: str
    model: ModelFacts
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = ""
    dtype: str = ""
    activations: str = ""
    created: str = ""
    layers: tuple[LayerSpec, ...] = ()
    units: tuple[Unit, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    calibration: CalibrationRecord | None = None
    sensitivity: Mapping[str, SensitivityTable] = field(default_factory=dict)
    validation: Validation | None = None
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    activation_sparsity: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    plan: Plan | None = None
    front: tuple[FrontPoint, ...] = ()
    size: SizeReport | None = None
    results: tuple[LayerResult, ...] = ()
    quality: GuardQuality | None = None
    verification: VerificationFacts | None = None
    speed: SpeedReport | None = None
    comparison: Comparison = field(default_factory=Comparison)
    baseline_source: str | None = None
    notices: tuple[Notice, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def evaluation(self) -> tuple[EvalResult, ...]:
        """The model's results."""
        return self.comparison.results

    @property
    def baseline(self) -> tuple[EvalResult, ...]:
        """The baseline's results."""
        return self.comparison.baseline

    @property
    def paired(self) -> tuple[PairedDifference, ...]:
        """Differences to the baseline on the same samples."""
        return self.comparison.paired

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for report.json, in the order of the fields.

        Units list the names of their layers only; results, the baseline's and paired differences
        are lists of their own. Numbers that JSON cannot hold become the texts
        "nan", "inf" and "-inf", which `float()` reads back.
        """
        data: dict[str, Any] = {}
        for item in fields(self):
            if item.name == "comparison":
                data["evaluation"] = convert_to_plain(self.evaluation)
                data["baseline"] = convert_to_plain(self.baseline)
                continue
            data[item.name] = convert_to_plain(getattr(self, item.name))
            if item.name == "baseline_source":
                data["paired"] = [_convert_pair(pair) for pair in self.paired]
        for unit in data["units"]:
            unit["layers"] = [layer["name"] for layer in unit["layers"]]
        if data["calibration"]:
            del data["calibration"]["sketch"]  # large, and stored in cptq.json
        return {"schema": SCHEMA, **data}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeOutcome:
    """Return value of `analyze`; `reports` maps "json", "md" and "html" to files."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOutcome:
    """Return value of `compress`; `out` is the directory of the artifact."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)
    artifact: Artifact | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOutcome:
    """Return value of `evaluate`; `out` is the JSON file or the directory of reports, if any."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthCount:
    """How much of the model is stored as one candidate."""

    label: str
    bits: int
    layers: int
    weights: int
    share: float


def _convert_pair(pair: PairedDifference) -> dict[str, Any]:
    return {
        **convert_to_plain(pair),
        "at_most_worse": pair.at_most_worse,
        "verdict": pair.verdict,
    }


def convert_to_plain(value: Any) -> Any:
    """Convert a value to JSON types: dict, list, str, int, float, bool, None."""
    if isinstance(value, Candidate):
        return value.label
    if isinstance(value, SensitivityTable | Plan):
        return convert_to_plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: convert_to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {_format_key(key): convert_to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [convert_to_plain(item) for item in value]
    return _convert_scalar(value)


def _format_key(key: Any) -> str:
    return key.label if isinstance(key, Candidate) else str(key)


def _convert_scalar(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def map_layer_choices(summary: Summary) -> dict[str, Candidate]:
    """Map the name of each planned layer to its candidate, in forward order."""
    plan = summary.plan
    if plan is None:
        return {}
    return {
        layer.name: plan.choices[unit.name]
        for unit in summary.units
        if unit.name in plan.choices
        for layer in unit.layers
    }


def count_widths(summary: Summary) -> list[WidthCount]:
    """Count planned layers by candidate, narrowest first; `share` is of the planned weights."""
    specs = {layer.name: layer for unit in summary.units for layer in unit.layers}
    grouped: dict[Candidate, list[LayerSpec]] = {}
    for name, candidate in map_layer_choices(summary).items():
        grouped.setdefault(candidate, []).append(specs[name])
    total = sum(spec.numel for rows in grouped.values() for spec in rows) or 1
    return [
        WidthCount(
            label=candidate.label,
            bits=candidate.bits,
            layers=len(rows),
            weights=sum(row.numel for row in rows),
            share=sum(row.numel for row in rows) / total,
        )
        for candidate, rows in sorted(grouped.items())
    ]


def list_unplanned_layers(summary: Summary) -> list[LayerSpec]:
    """List layers outside every unit: embeddings, heads, layers that cptq cannot compress."""
    units = {layer.name for unit in summary.units for layer in unit.layers}
    return [layer for layer in summary.layers if layer.name not in units]


def rank_units(table: SensitivityTable, count: int) -> list[tuple[str, float]]:
    """Return the `count` units with the highest scores, highest first; ties in forward order."""
    ranked = [(unit, score) for unit, score in table.per_unit.items() if isfinite(score)]
    return sorted(ranked, key=lambda pair: -pair[1])[:count]


def group_notices(notices: Iterable[Notice]) -> Mapping[str, list[Notice]]:
    """Group notices by kind in `NOTICE_ORDER`; kinds without notices are omitted."""
    rows = list(notices)
    grouped = {kind: [row for row in rows if row.kind == kind] for kind in NOTICE_ORDER}
    return {kind: found for kind, found in grouped.items() if found}
