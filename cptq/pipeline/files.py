"""The files that a stage leaves for people to read and for the next stage to replay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cptq.allocation.allocate import check_plan
from cptq.allocation.cost import CostModel
from cptq.checkpoint.model import LoadedModel
from cptq.errors import PlanError
from cptq.report.summary import convert_to_plain
from cptq.sensitivity import METRICS
from cptq.types import (
    CalibrationRecord,
    Candidate,
    Emit,
    Notice,
    Plan,
    SensitivityTable,
    Validation,
)

#: version of the layout of sensitivity/*.json; grows when a field or a score changes its meaning
TABLE_SCHEMA = 1
_MEASURE = "measure this model with cptq analyze"


def encode_stage_files(
    model: LoadedModel,
    calibration: CalibrationRecord | None,
    tables: Mapping[str, SensitivityTable],
    plan: Plan | None,
    validation: Validation | None = None,
    *,
    sparsity: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return {relative path: content} of layers, calibration, tables, plan, validation, sparsity.

    Without a `calibration` there is no file of it. No file holds seconds, so that the same run
    writes the same bytes; they stand in the reports.
    """
    layers = {
        "model_fingerprint": model.fingerprint,
        "blocks": list(model.block_names),
        "layers": [convert_to_plain(layer) for layer in model.layers],
        "units": {unit.name: [layer.name for layer in unit.layers] for unit in model.all_units},
    }
    files = {"layers.json": layers}
    if calibration is not None:
        files["calibration.json"] = convert_to_plain(calibration)
    for name, table in tables.items():
        files[f"sensitivity/{name}.json"] = _encode_table(table)
    if plan is not None:
        files["plan.json"] = plan.to_dict()
    if validation is not None:
        files["validation.json"] = {
            "model_fingerprint": model.fingerprint,
            **_leave_out_seconds(convert_to_plain(validation)),
            "agreements": [_leave_out_seconds(convert_to_plain(a)) for a in validation.agreements],
        }
    for name, content in (sparsity or {}).items():
        files[f"sparsity/{name}.json"] = {
            "model_fingerprint": model.fingerprint,
            **convert_to_plain(content),
        }
    return {name: _encode_json(content) for name, content in files.items()}


def _encode_table(table: SensitivityTable) -> dict[str, Any]:
    return {"schema": TABLE_SCHEMA, **_leave_out_seconds(convert_to_plain(table))}


def _leave_out_seconds(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "seconds"}


def read_table(path: Path, model_fingerprint: str) -> SensitivityTable:
    """Read the measurement in a file that `analyze` wrote.

    Raises:
        PlanError: it cannot be read, lacks units, or is of another model or version of cptq.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data.pop("schema", None)
        if schema != TABLE_SCHEMA:
            raise ValueError(f"its schema is {schema!r}, and this cptq reads {TABLE_SCHEMA}")
        table = SensitivityTable.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PlanError(f"{path} holds no sensitivity table: {reason}", hint=_MEASURE) from error
    if table.metric not in METRICS:
        raise PlanError(
            f"{path} was measured by {table.metric!r}, which this cptq does not have",
            allowed=", ".join(METRICS),
            hint=_MEASURE,
        )
    if table.model_fingerprint != model_fingerprint:
        raise PlanError(
            f"{path} was measured on another model ({table.model_fingerprint[:12]}, this is "
            f"{model_fingerprint[:12]})",
            hint=_MEASURE,
        )
    return table


def read_tables(
    paths: Sequence[Path], model_fingerprint: str, options: Mapping[str, Sequence[Candidate]]
) -> dict[str, SensitivityTable]:
    """Read {metric: table} from files and directories that `analyze` wrote.

    Raises:
        PlanError: as `read_table` and `check_covers`; a directory has no tables.
    """
    found: dict[str, SensitivityTable] = {}
    for path in paths:
        place = path / "sensitivity" if (path / "sensitivity").is_dir() else path
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not files:
            raise PlanError(f"{path} holds no sensitivity tables", hint=_MEASURE)
        for file in files:
            table = read_table(file, model_fingerprint)
            check_covers(table, file, options)
            found[table.metric] = table
    return found


def fit_plan(plan: Plan, model: LoadedModel, cost: CostModel) -> Plan:
    """Check a plan against this model, and return it with its bytes counted anew."""
    check_plan(plan, cost, model.fingerprint)
    return replace(plan, predicted_bytes=cost.file_bytes(plan.choices))


def fill_in_scales(
    table: SensitivityTable, options: Mapping[str, Sequence[Candidate]], emit: Emit
) -> SensitivityTable:
    """Let a score stand for candidates that differ in scales and spacing of levels alone.

    Which way that is depends on the runtime, and it hardly changes how units compare, so that one
    measurement serves several runtimes. What stands for what is said.
    """
    scores = {unit: dict(row) for unit, row in table.scores.items()}
    stood: dict[str, str] = {}
    for unit, row in options.items():
        known = scores.get(unit, {})
        alike = {_forget_grid(c): c for c in sorted(known, reverse=True)}
        for candidate in row:
            other = alike.get(_forget_grid(candidate))
            if candidate not in known and other is not None:
                known[candidate] = known[other]
                stood[candidate.label] = other.label
    if not stood:
        return table
    pairs = ", ".join(f"{own} by that of {other}" for own, other in stood.items())
    message = f"scales or levels are stored in another way than when it was measured: {pairs}"
    emit(Notice(kind="info", subject="--sensitivity", message=message))
    return replace(table, scores=scores)


def _forget_grid(candidate: Candidate) -> Candidate:
    """Return the candidate with 16-bit scales and even levels that takes about the same bytes."""
    size = candidate.group_size * (2 if candidate.scales else 1)
    return replace(candidate, scales="", levels="", group_size=size)


def check_covers(
    table: SensitivityTable, path: Path, options: Mapping[str, Sequence[Candidate]]
) -> None:
    """Check that a measurement has a score for everything that can be chosen.

    Raises:
        PlanError: a candidate that a unit may have was not measured, or a unit was not.
    """
    measured = sorted({candidate for row in table.scores.values() for candidate in row})
    for unit, row in options.items():
        scores = table.scores.get(unit)
        if scores is None:
            raise PlanError(f"{path} has no scores of {unit}", hint=_MEASURE)
        missing = [candidate for candidate in row if candidate not in scores]
        if missing and len(row) > 1:
            grids = [c for c in measured if not c.dense and not c.float8]
            sizes = sorted({2 * c.group_size if c.scales else c.group_size for c in grids})
            words = f"--bits {','.join(str(b) for b in sorted({c.bits for c in measured}))}"
            words += f" --group-size {sizes[0]}" if len(sizes) == 1 else ""
            if any(c.scales for c in missing) and not any(c.scales for c in measured):
                words += " --scales 16bit"
            if any(c.levels for c in missing) and not any(c.levels for c in measured):
                words += " --levels even"
            raise PlanError(
                f"{path} has no score for {', '.join(c.label for c in missing)}",
                allowed=", ".join(candidate.label for candidate in measured),
                hint=f"type {words}, or measure again with cptq analyze and your --runtime, "
                "--bits, --group-size and --sparsity",
            )


def _encode_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
