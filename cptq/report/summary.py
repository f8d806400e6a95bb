"""What a run found, as one immutable value: the only thing that a report is made from.

Everything is a plain noun of `cptq.types`, so that a report can be written, read back and compared
without torch. Stages that did not run leave their field empty.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    LayerResult,
    LayerSpec,
    Notice,
    PairedDifference,
    Plan,
    SensitivityTable,
    SizeReport,
    Unit,
    Validation,
)

#: version of the layout of report.json; grows when a field changes its meaning or goes
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Which model it was. `parameters` counts tied weights once; `dtype` is the storage type."""

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
    """What a fresh process found when it loaded the written artifact with stock transformers.

    `max_abs_difference` is that of the outputs to the compressed model in memory.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    max_abs_difference: float | None = None
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """No key missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything a report tells. Bytes and seconds are named in the fields."""

    command: str
    command_line: str
    model: ModelFacts
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = ""
    dtype: str = ""
    created: str = ""
    layers: tuple[LayerSpec, ...] = ()
    units: tuple[Unit, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    calibration: CalibrationRecord | None = None
    sensitivity: Mapping[str, SensitivityTable] = field(default_factory=dict)
    validation: Validation | None = None
    budget: Budget | None = None
    plan: Plan | None = None
    size: SizeReport | None = None
    results: tuple[LayerResult, ...] = ()
    verification: VerificationFacts | None = None
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
        """Plain data for report.json, in the order of the fields.

        Units name their layers only; results, the baseline's and paired differences are lists of
        their own. Numbers that JSON cannot hold become the texts "nan", "inf" and "-inf", which
        `float()` reads back.
        """
        data: dict[str, Any] = {}
        for item in fields(self):
            if item.name == "comparison":
                data |= {"evaluation": plain(self.evaluation), "baseline": plain(self.baseline)}
                continue
            data[item.name] = plain(getattr(self, item.name))
            if item.name == "baseline_source":
                data["paired"] = [_plain_pair(pair) for pair in self.paired]
        for unit in data["units"]:
            unit["layers"] = [layer["name"] for layer in unit["layers"]]
        if data["calibration"]:
            del data["calibration"]["sketch"]  # for machines, and in cptq.json
        return {"schema": SCHEMA, **data}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeOutcome:
    """What `analyze` hands back; `reports` maps "json", "md" and "html" to files."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOutcome:
    """What `compress` hands back: `out` is the directory of the artifact."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)
    artifact: Artifact | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOutcome:
    """What `evaluate` hands back: `out` is the JSON file of the results, if one was asked for."""

    summary: Summary
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


def _plain_pair(pair: PairedDifference) -> dict[str, Any]:
    return {**plain(pair), "at_most_worse": pair.at_most_worse, "verdict": pair.verdict}


def plain(value: Any) -> Any:
    """`value` as what JSON knows: dict, list, str, int, float, bool, None."""
    if isinstance(value, Candidate):
        return value.label
    if isinstance(value, SensitivityTable | Plan):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return _scalar(value)


def _key(key: Any) -> str:
    return key.label if isinstance(key, Candidate) else str(key)


def _scalar(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
