"""What an analysis was measured with: the settings of a plan that is made from its scores.

A directory that `cptq analyze`, `cptq plan -o` or `cptq compress` wrote holds
`sensitivity/METRIC.json` and, in report.json or plans.json, the settings of its run. Those that
decide what was measured become the defaults of `cptq plan DIR`. What grants trust or access
(--trust-remote-code, --token) is not taken from a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptq.errors import PlanError

#: where the settings of a run stand
RECORDS = ("report.json", "plans.json")
#: of several tables, the one that a plan is made from unless --metric says otherwise
DEFAULT_METRIC = "output"
_TAKEN = (
    *("model", "revision", "dtype", "runtime", "bits", "group_size", "scales", "asymmetric"),
    *("sparsity", "calibration", "samples", "documents", "seqlen", "data_dir", "seed"),
)


def read_analysis(place: Path, metric: str | None = None) -> dict[str, Any] | None:
    """Return the settings of a plan from an analysis, its table as `sensitivity`.

    Returns:
        None where `place` is no such directory: a model, or nothing.

    Raises:
        PlanError: its record is damaged, or it has no table of `metric`.
    """
    tables = sorted(place.glob("sensitivity/*.json"))
    record = next((place / name for name in RECORDS if (place / name).is_file()), None)
    if not tables or record is None:
        return None
    given = _read_settings(record)
    taken = {name: given[name] for name in _TAKEN if given.get(name) is not None}
    return {**taken, "sensitivity": _choose_table(place, tables, metric)}


def _read_settings(record: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
        assert isinstance(settings["model"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise PlanError(
            f"{record} does not say what was measured",
            hint="name the model, and the scores with --sensitivity",
        ) from error
    found: Mapping[str, Any] = settings
    return found


def _choose_table(place: Path, tables: list[Path], metric: str | None) -> Path:
    names = [table.stem for table in tables]
    wanted = metric or (DEFAULT_METRIC if DEFAULT_METRIC in names else names[0])
    if wanted not in names:
        raise PlanError(
            f"{place} has no scores of {wanted!r}",
            allowed=", ".join(names),
            hint=f"cptq analyze MODEL --metric {wanted} measures them",
        )
    if metric is None and DEFAULT_METRIC not in names and len(names) > 1:
        raise PlanError(
            f"{place} holds the scores of several metrics",
            allowed=f"--metric with one of {', '.join(names)}",
        )
    return place / "sensitivity" / f"{wanted}.json"
