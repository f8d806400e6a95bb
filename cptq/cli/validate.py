"""What can be refused before torch is imported: names, targets, plans, places.

Each check fills in what follows from the settings alone: all metrics for `all`, the default output.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from cptq.config import (
    AnalyzeSettings,
    CompareSettings,
    CompressSettings,
    EvalSettings,
    Settings,
)
from cptq.errors import OutputExistsError, PlanError, UsageError
from cptq.registry import Registry, closest
from cptq.types import Plan

#: kind of name -> where its registry lies; none of these modules imports torch
REGISTRIES = {
    "metric": "cptq.sensitivity:METRICS",
    "allocator": "cptq.allocation:ALLOCATORS",
    "compressor": "cptq.compression:COMPRESSORS",
}
ALL = "all"
#: a directory that holds one of these was written by cptq
OURS = ("cptq.json", "report.json", "compare.json")


def registry(kind: str) -> Registry[Any]:
    """The registry of the metrics, allocators or compressors."""
    module, _, attribute = REGISTRIES[kind].partition(":")
    found: Registry[Any] = getattr(import_module(module), attribute)
    return found


def checked(settings: Settings) -> Settings:
    """The settings with their defaults filled in.

    Raises:
        CptqError: a name, target, plan or place that cannot be used.
    """
    if isinstance(settings, AnalyzeSettings):
        return _analyze(settings)
    if isinstance(settings, CompressSettings):
        return _compress(settings)
    return _compare(settings) if isinstance(settings, CompareSettings) else _evaluate(settings)


def _analyze(settings: AnalyzeSettings) -> AnalyzeSettings:
    metrics = metric_names(settings.metrics)
    for name in settings.allocators:
        registry("allocator").check(name)
    registry("compressor").check(settings.compressor)
    for target in settings.targets:
        import_module("cptq.allocation.targets").parse_target(target)
    _check_calibration(settings.calibration.calibration)
    for path in settings.sensitivity:
        check_measurement(path, directory=True)
    out = settings.out or Path(f"{model_name(settings.model.model)}-analysis")
    check_place(out, settings.model.model, overwrite=settings.overwrite)
    return replace(settings, metrics=metrics, out=out)


def _compress(settings: CompressSettings) -> CompressSettings:
    for kind in ("metric", "allocator", "compressor"):
        registry(kind).check(getattr(settings, kind))
    _check_calibration(settings.calibration.calibration)
    import_module("cptq.allocation.constraints").parse_constraints(
        settings.pins, settings.min_bits, settings.max_bits
    )
    if settings.sensitivity is not None:
        check_measurement(settings.sensitivity, directory=False)
    if settings.plan is not None:
        check_plan(settings.plan)
    elif settings.target is not None:
        import_module("cptq.allocation.targets").parse_target(settings.target)
    out = settings.out or default_artifact(settings)
    check_place(out, settings.model.model, overwrite=settings.overwrite)
    return replace(settings, out=out)


def _evaluate(settings: EvalSettings) -> EvalSettings:
    check_task = import_module("cptq.evaluation").check_task
    for task in settings.tasks:
        check_task(task)
    if settings.out is not None:
        check_place(settings.out, settings.model.model, overwrite=settings.overwrite)
        if settings.out.is_dir():
            raise UsageError(f"{settings.out} is a directory", hint="name a file: -o results.json")
    return settings


def _compare(settings: CompareSettings) -> CompareSettings:
    check_task = import_module("cptq.evaluation").check_task
    for task in settings.tasks:
        check_task(task)
    for source in settings.sources:
        if source.endswith(".json") and not Path(source).expanduser().is_file():
            raise UsageError(
                f"no file {source!r}", hint="`cptq eval MODEL -o eval.json` writes one"
            )
        if settings.out is not None:
            check_place(settings.out, source, overwrite=settings.overwrite)
    return settings


def metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics asked for, each once; `all` stands for every one that is not slow."""
    known = registry("metric")
    for name in names:
        if name != ALL and name not in known:
            near = closest(name, [*known, ALL])
            raise UsageError(
                f"unknown metric {name!r}",
                allowed=", ".join([*known, ALL]),
                hint=f"did you mean {near!r}?" if near else None,
            )
    everyday = import_module("cptq.sensitivity").everyday()
    return tuple(dict.fromkeys(n for m in names for n in (everyday if m == ALL else (m,))))


def _check_calibration(source: str) -> None:
    import_module("cptq.data").check_source(source)


def check_measurement(path: Path, *, directory: bool) -> None:
    """Refuse a --sensitivity that is not there, and a directory where one table is meant.

    Raises:
        PlanError: says what to name.
    """
    hint = "cptq analyze MODEL -o DIR writes DIR/sensitivity/METRIC.json"
    if not path.exists():
        raise PlanError(f"--sensitivity {path} is not there", hint=hint)
    if path.is_dir() and not directory:
        table = next(iter(sorted(path.glob("**/sensitivity/*.json"))), None)
        what = f"name one of its tables, such as {table}" if table else hint
        raise PlanError(f"--sensitivity {path} is a directory", hint=what)


def check_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        PlanError: no such file, or it holds no plan.
    """
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise PlanError(f"the plan {path} cannot be read: {reason}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "`cptq compress` writes a plan.json that can be edited"
        raise PlanError(f"{path} holds no plan: {error}", hint=hint) from error


def model_name(model: str) -> str:
    """The last part of a Hub id or of a path, to name an output after it."""
    local = Path(model).expanduser()
    name = local.resolve().name if local.exists() else model.rstrip("/").rpartition("/")[2]
    return name or "model"


def default_artifact(settings: CompressSettings) -> Path:
    """`<model>-cptq-<target>` in the current directory."""
    words = settings.plan.stem if settings.plan else str(settings.target).strip().lower()
    return Path(f"{model_name(settings.model.model)}-cptq-{words.replace('/', '-')}")


def check_place(out: Path, model: str, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written, or whose content would be lost.

    `--overwrite` replaces a file, and a directory that cptq wrote or that is empty; nothing else,
    so that a slip of the hand costs no one their files.

    Raises:
        UsageError: the output is the model or holds it, or is no output of cptq.
        OutputExistsError: it is there and may not be overwritten.
    """
    source = Path(model).expanduser()
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} would replace the model itself", hint="choose another -o"
        )
    there = out.exists() or out.is_symlink()
    if there and not overwrite:
        raise OutputExistsError(
            f"{out} is already there", hint="give another -o, or --overwrite to replace it"
        )
    if there and out.is_dir() and any(out.iterdir()) and not any((out / n).exists() for n in OURS):
        raise UsageError(
            f"{out} was not written by cptq, so --overwrite leaves it alone",
            hint="choose another -o, or remove it yourself",
        )
    _check_parent(out)


def _check_parent(out: Path) -> None:
    parent = next(place for place in out.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out} cannot be written: {parent} is no directory that you may write to")
