"""Checks that need no torch: names, targets, plans and output places.

Each check also fills in what the settings alone determine: the metrics that `all` stands for, and
the default output.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cptq.config import (
    GGUF,
    RESULT_FILE,
    AnalyzeSettings,
    AnySettings,
    BenchSettings,
    CompareSettings,
    CompressSettings,
    EvalSettings,
    ExportSettings,
    GenerateSettings,
    PlanSettings,
    list_options,
    parse_activation_sparsity,
)
from cptq.errors import ModelError, OutputExistsError, PlanError, UsageError
from cptq.registry import find_closest
from cptq.types import Plan

ALL = "all"
#: a directory that holds one of these was written by cptq
OUTPUT_MARKERS = ("cptq.json", "report.json", "compare.json", "plans.json", "soup.json")


def check_settings(settings: AnySettings, *, writes: bool = True) -> AnySettings:
    """Return the settings with their defaults filled in.

    `writes`: check also that the output of `compress` can be written.

    Raises:
        CptqError: a name, target, plan or place that cannot be used.
    """
    if isinstance(settings, AnalyzeSettings):
        return _check_analyze(settings)
    if isinstance(settings, CompressSettings):
        return _check_compress(settings, writes)
    if isinstance(settings, PlanSettings):
        return _check_plan(settings)
    if isinstance(settings, EvalSettings):
        return _check_eval(settings)
    if isinstance(settings, CompareSettings):
        return _check_compare(settings)
    if isinstance(settings, BenchSettings):
        return _check_bench(settings)
    if isinstance(settings, GenerateSettings) and settings.model.model.endswith(GGUF):
        raise ModelError(
            f"{settings.model.model} is a GGUF file, which cptq generate does not run",
            allowed="a checkpoint or an artifact",
            hint="run it with llama.cpp",
        )
    if isinstance(settings, ExportSettings):
        _check_names(settings, "format")
    return settings


def _check_analyze(settings: AnalyzeSettings) -> AnalyzeSettings:
    metrics = expand_metrics(settings.metrics)
    _check_names(settings, "allocators", "compressor")
    for target in settings.targets:
        import_module("cptq.allocation.targets").parse_target(target)
    _check_calibration(settings.calibration.calibration)
    for path in settings.sensitivity:
        check_measurement(path, directory=True)
    out = settings.out or Path(f"{find_model_name(settings.model.model)}-analysis")
    _check_directory(out, settings)
    return replace(settings, metrics=metrics, out=out)


def _check_compress(settings: CompressSettings, writes: bool) -> CompressSettings:
    names = ("metric", "allocator", "compressor", "sparsity_score", "sparsity_profile")
    _check_names(settings, *names)
    _check_activation_method(settings)
    _check_calibration(settings.calibration.calibration)
    _check_constraints(settings)
    if settings.sensitivity is not None:
        check_measurement(settings.sensitivity, directory=False)
    if settings.plan is not None:
        Plan.load(settings.plan)
    elif settings.target is not None:
        import_module("cptq.allocation.targets").parse_target(settings.target)
    if not writes:
        return settings
    out = settings.out or name_artifact(settings)
    if settings.dry_run:  # writes nothing, so that no output is in the way
        return replace(settings, out=out)
    _check_directory(out, settings)
    return replace(settings, out=out)


def _check_activation_method(settings: CompressSettings) -> None:
    if settings.activation_sparsity is not None:
        registry = list_options(type(settings))["activation_sparsity"].load_registry()
        registry.check(parse_activation_sparsity(settings.activation_sparsity)[0])


def _check_directory(out: Path, settings: AnalyzeSettings | CompressSettings) -> None:
    """Check the output of a command that can be resumed.

    What was killed at its very end may find its own output there, which only its record tells.
    """
    there = settings.overwrite or settings.resume
    check_place(out, settings.model.model, overwrite=there)


def _check_plan(settings: PlanSettings) -> PlanSettings:
    _check_names(settings, "metric", "allocator", "compressor")
    _check_calibration(settings.calibration.calibration)
    _check_constraints(settings)
    if settings.sensitivity is not None:
        check_measurement(settings.sensitivity, directory=False)
    for target in settings.targets:
        import_module("cptq.allocation.targets").parse_target(target)
    if settings.out is not None:
        check_place(settings.out, settings.model.model, overwrite=settings.overwrite)
    return settings


def _check_constraints(settings: PlanSettings | CompressSettings) -> None:
    import_module("cptq.allocation.constraints").parse_constraints(
        settings.pins, settings.min_bits, settings.max_bits
    )


def _check_eval(settings: EvalSettings) -> EvalSettings:
    _check_tasks(settings.tasks)
    out, model = settings.out, settings.model.model
    if out is not None and out.suffix != RESULT_FILE:
        check_place(out, model, overwrite=settings.overwrite)
    else:
        _check_result_file(out, model, overwrite=settings.overwrite)
    return settings


def _check_result_file(out: Path | None, model: str, *, overwrite: bool) -> None:
    if out is not None:
        check_place(out, model, overwrite=overwrite)
        if out.is_dir():
            raise UsageError(f"{out} is a directory", hint="name a file: -o results.json")


def _check_bench(settings: BenchSettings) -> BenchSettings:
    for source in settings.sources:
        _check_result_file(settings.out, source, overwrite=settings.overwrite)
        if source.endswith(GGUF):
            _check_gguf(Path(source).expanduser())
    return settings


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}", hint="cptq export --format gguf writes one")
    if find_spec("llama_cpp") is None:
        raise ModelError(
            f"{path} needs llama-cpp-python, which is not installed",
            hint='type pip install "cptq[llamacpp]"',
        )


def _check_compare(settings: CompareSettings) -> CompareSettings:
    _check_tasks(settings.tasks)
    for source in settings.sources:
        if source.endswith(".json") and not Path(source).expanduser().is_file():
            raise UsageError(
                f"no file {source!r}", hint="`cptq eval MODEL -o eval.json` writes one"
            )
        if settings.out is not None:
            check_place(settings.out, source, overwrite=settings.overwrite)
    return settings


def _check_names(settings: AnySettings, *fields: str) -> None:
    """Refuse values of these fields that their registries do not hold."""
    options = list_options(type(settings))
    for field in fields:
        value: Any = getattr(settings, field)
        registry = options[field].load_registry()
        for name in value if isinstance(value, tuple) else (value,):
            registry.check(name)


def _check_tasks(names: tuple[str, ...]) -> None:
    check_task = import_module("cptq.evaluation").check_task
    for name in names:
        check_task(name)


def _check_calibration(source: str) -> None:
    import_module("cptq.data").check_source(source)


def expand_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the metrics, each once, with every one that is not slow in place of `all`."""
    known = list_options(AnalyzeSettings)["metrics"].load_registry()
    for name in names:
        if name != ALL and name not in known:
            near = find_closest(name, [*known, ALL])
            raise UsageError(
                f"unknown metric {name!r}",
                allowed=", ".join([*known, ALL]),
                hint=f"did you mean {near!r}?" if near else None,
            )
    defaults = import_module("cptq.sensitivity").list_default_metrics()
    return tuple(dict.fromkeys(n for m in names for n in (defaults if m == ALL else (m,))))


def check_measurement(path: Path, *, directory: bool) -> None:
    """Refuse a --sensitivity that does not exist, and a directory where one table is needed.

    Raises:
        PlanError: names what to give instead.
    """
    hint = "cptq analyze MODEL -o DIR writes DIR/sensitivity/METRIC.json"
    if not path.exists():
        raise PlanError(f"--sensitivity {path} does not exist", hint=hint)
    if path.is_dir() and not directory:
        table = next(iter(sorted(path.glob("**/sensitivity/*.json"))), None)
        example = f"name one of its tables, such as {table}" if table else hint
        raise PlanError(f"--sensitivity {path} is a directory", hint=example)


def find_model_name(model: str) -> str:
    """Return the last part of a Hub id or of a path, to name an output after it."""
    local = Path(model).expanduser()
    name = local.resolve().name if local.exists() else model.rstrip("/").rpartition("/")[2]
    return name or "model"


def name_artifact(settings: CompressSettings) -> Path:
    """Return `<model>-cptq-<target>` in the current directory."""
    words = settings.plan.stem if settings.plan else str(settings.target).strip().lower()
    return Path(f"{find_model_name(settings.model.model)}-cptq-{words.replace('/', '-')}")


def check_place(out: Path, model: str, *, overwrite: bool) -> None:
    """Refuse an output place that is not writable, or whose content would be lost.

    `--overwrite` replaces a file, and a directory that is empty or that cptq wrote, and nothing
    else: a mistyped -o must not delete other files.

    Raises:
        UsageError: the output is the model or holds it, or was not written by cptq.
        OutputExistsError: it exists and may not be overwritten.
    """
    source = Path(model).expanduser()
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"the output {out} would replace the model itself", hint="choose another -o"
        )
    exists = out.exists() or out.is_symlink()
    if exists and not overwrite:
        raise OutputExistsError(
            f"{out} already exists", hint="choose another -o, or add --overwrite to replace it"
        )
    if exists and out.is_dir() and any(out.iterdir()) and not _is_output(out):
        raise UsageError(
            f"{out} was not written by cptq, so --overwrite does not replace it",
            hint="choose another -o, or remove it yourself",
        )
    _check_parent(out)


def _is_output(directory: Path) -> bool:
    return any((directory / name).exists() for name in OUTPUT_MARKERS)


def _check_parent(out: Path) -> None:
    parent = next(place for place in out.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{out} cannot be written: {parent} is not a directory that you may write to",
            hint="choose another -o",
        )
