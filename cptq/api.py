"""The Python API: the commands of the command line as functions.

    import cptq

    result = cptq.compress("facebook/opt-125m", target="4bit", out="opt-125m-4bit")
    print(result.artifact.weight_bytes, "bytes in", result.out)

Keyword arguments are the options of the command line, made from the same settings fields:
`group_size=32` is `--group-size 32`. The values take the types of the fields (`bits=(3, 4, 8)`) or
the texts of the command line (`bits="3,4,8"`); a repeatable option takes a list, under its plural
name or its flag's (`metrics=[...]` or `metric=[...]`). `help(cptq.compress)` lists all of them.

Each function takes `progress`, which is called with events: `cptq.types.Progress` (stage, done,
total) and `cptq.types.Notice` (warning, fallback, skipped, info). Without it, warnings and
fallbacks become Python warnings, and the rest is dropped; the outcome's summary lists all notices.

Errors are `cptq.errors.CptqError`: one sentence with what is wrong, what is allowed and what to do
next. No output is left half-written, and none is replaced without `overwrite=True`.

Importing this module imports neither torch nor transformers; calling a function does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar

from cptq.config import (
    AnalyzeSettings,
    AnySettings,
    BenchSettings,
    CompareSettings,
    CompressSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    GenerateSettings,
    InspectSettings,
    MethodsSettings,
    PlanSettings,
    SoupSettings,
    VerifySettings,
    list_options,
    name_fields,
    settings_from,
)
from cptq.preflight import check_settings
from cptq.types import Emit, Event, Notice

if TYPE_CHECKING:
    from cptq.artifact.inspect import Inspection
    from cptq.artifact.verify import VerifiedArtifact
    from cptq.checkpoint.ranks import Ranks
    from cptq.pipeline.export import ExportOutcome
    from cptq.pipeline.soup import SoupOutcome
    from cptq.report.bench import BenchOutcome
    from cptq.report.comparison import CompareOutcome
    from cptq.report.estimate import Estimate
    from cptq.report.generation import GenerateOutcome
    from cptq.report.plans import PlansOutcome
    from cptq.report.summary import AnalyzeOutcome, CompressOutcome, EvalOutcome
    from cptq.types import Plan

F = TypeVar("F", bound=Callable[..., Any])
Source = str | os.PathLike[str]

#: settings -> the function of `cptq.pipeline` that carries them out
_FUNCTIONS: Mapping[type, str] = {
    AnalyzeSettings: "analyze",
    PlanSettings: "plan_targets",
    CompressSettings: "compress",
    EvalSettings: "evaluate",
    CompareSettings: "compare",
    ExportSettings: "export",
    SoupSettings: "soup",
    BenchSettings: "bench",
    GenerateSettings: "generate",
}
#: options that decide how a plan is carried out and written, which `plan` does not do
_NOT_FOR_PLANS = (
    *("plan", "out", "overwrite", "push_to_hub", "compressor", "check_uniform"),
    *("tune", "tune_minutes", "resume", "dry_run", "evaluate"),
)


def execute(settings: AnySettings, emit: Emit, ranks: Ranks | None = None) -> Any:
    """Carry out settings that passed `check_settings`; return the outcome of their command.

    `ranks`: the processes that share it, of which only `compress` can make use.
    """
    if isinstance(settings, InspectSettings):
        return import_module("cptq.pipeline.inspect").inspect(settings)
    if isinstance(settings, MethodsSettings):
        return import_module("cptq.catalogue").list_methods(settings)
    if isinstance(settings, DoctorSettings):
        return import_module("cptq.doctor").examine(settings)
    if isinstance(settings, VerifySettings):
        return import_module("cptq.artifact.verify").verify_artifact(
            settings.artifact, emit, trust_remote_code=settings.trust_remote_code
        )
    pipeline = import_module("cptq.pipeline")
    more = () if ranks is None or ranks.count == 1 else (ranks,)
    with import_module("cptq.checkpoint.bars").hide_bars():
        if isinstance(settings, CompressSettings) and settings.dry_run:
            return pipeline.estimate(settings, emit)
        return getattr(pipeline, _FUNCTIONS[type(settings)])(settings, emit, *more)


def _takes(kind: type, *given: str, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Give a function the signature and the documentation of a settings class's options.

    Args:
        kind: the settings class.
        given: the options that the function names itself.
        without: options that it does not take.
    """
    options = {n: o for n, o in list_options(kind).items() if n not in (*given, *without)}

    def document(function: F) -> F:
        named = Signature.from_callable(function).parameters.values()
        own = [p for p in named if p.kind is not Parameter.VAR_KEYWORD]
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=o.default, annotation=o.hint)
            for name, o in options.items()
        ]
        listed = "\n".join(f"        {name}: {o.describe()}" for name, o in options.items())
        function.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]
        function.__doc__ = f"{function.__doc__}\n    Options:\n{listed}\n"
        return function

    return document


def _build(kind: type[Any], given: Mapping[str, Any], without: tuple[str, ...] = ()) -> Any:
    """Return settings from keyword arguments, checked as far as that needs no model."""
    options = {n: o for n, o in list_options(kind).items() if n not in without}
    named = name_fields(options, given, "unknown option")
    line = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, (_, value) in named.items()
    }
    return check_settings(settings_from(kind, line), writes="out" not in without)


def _choose_listener(progress: Emit | None) -> Emit:
    """Return the caller's; without one, notices become warnings."""
    return _warn if progress is None else progress


def _warn(event: Event) -> None:
    if isinstance(event, Notice) and event.kind in ("warning", "fallback"):
        warnings.warn(f"{event.subject}: {event.message}", stacklevel=4)


@_takes(AnalyzeSettings, "model")
def analyze(model: Source, *, progress: Emit | None = None, **options: Any) -> AnalyzeOutcome:
    """Measure how sensitive each layer is to compression; write scores and a report.

    Args:
        model: a Hub id or a directory of a dense checkpoint.
        progress: called with events.

    Returns:
        `summary.sensitivity` {metric: `SensitivityTable`}, `out` and the paths of the `reports`.

    Raises:
        CptqError: an option, the model or the text cannot be used.
    """
    settings = _build(AnalyzeSettings, {"model": model, **options})
    outcome: AnalyzeOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(CompressSettings, "model", without=_NOT_FOR_PLANS)
def plan(model: Source, *, progress: Emit | None = None, **options: Any) -> Plan:
    """Choose a bit width for every unit at a target size, and write nothing.

    With `sensitivity=` (a table that `analyze` wrote) nothing is measured, so that one measurement
    serves any number of targets. `Plan.save(PATH)` writes a file for `compress(plan=PATH)`.

    Args:
        model: a Hub id or a directory of a dense checkpoint.
        progress: called with events.

    Raises:
        CptqError: an option or the model cannot be used, or no plan reaches the target.
    """
    settings = _build(CompressSettings, {"model": model, **options}, _NOT_FOR_PLANS)
    found: Plan = import_module("cptq.pipeline").plan(settings, _choose_listener(progress))
    return found


@_takes(PlanSettings, "model")
def plan_targets(model: Source, *, progress: Emit | None = None, **options: Any) -> PlansOutcome:
    """Make plans of several sizes from one measurement, with the front of size against loss.

    Args:
        model: a Hub id or a directory of a dense checkpoint; or the directory of an analysis, whose
            model, settings and scores are then used.
        progress: called with events.

    Returns:
        `plans` {target: `Plan`}, the `view` (sizes, losses, seconds, front), and `explanations`.

    Raises:
        CptqError: an option, the model or the scores cannot be used, or no plan reaches a target.
    """
    settings = _build(PlanSettings, {"model": model, **options})
    found: PlansOutcome = execute(settings, _choose_listener(progress))
    return found


@_takes(CompressSettings, "model", without=("dry_run",))
def estimate(model: Source, *, progress: Emit | None = None, **options: Any) -> Estimate:
    """Return what `compress` would write, hold in memory and take; measure and write nothing.

    It takes the options of `compress`. The model and the text are loaded, and a block is timed.

    Args:
        model: a Hub id or a directory of a dense checkpoint.
        progress: called with events.

    Returns:
        `memory`, `disk`, `time` and, where no measurement is needed for it, the `plan`.

    Raises:
        CptqError: an option, the model or the text cannot be used, or no plan reaches the target.
    """
    settings = _build(CompressSettings, {"model": model, **options, "dry_run": True})
    found: Estimate = execute(settings, _choose_listener(progress))
    return found


@_takes(CompressSettings, "model", without=("dry_run",))
def compress(
    model: Source, *, progress: Emit | None = None, ranks: Ranks | None = None, **options: Any
) -> CompressOutcome:
    """Compress a model to a target size; write a verified artifact with a report.

    Args:
        model: a Hub id or a directory of a dense checkpoint.
        progress: called with events.
        ranks: of `with cptq.checkpoint.ranks.join("auto") as ranks`, where a launcher has started
            several processes, which all call this.

    Returns:
        `artifact` (path, weight_bytes, manifest), `summary` (plan, size, results), `out` and the
        paths of the `reports`.

    Raises:
        CptqError: an option, the model or the text cannot be used, no plan reaches the target, or
            the written artifact fails its check.
    """
    settings = _build(CompressSettings, {"model": model, **options}, ("dry_run",))
    outcome: CompressOutcome = execute(settings, _choose_listener(progress), ranks)
    return outcome


@_takes(EvalSettings, "model")
def evaluate(model: Source, *, progress: Emit | None = None, **options: Any) -> EvalOutcome:
    """Measure a model or an artifact by tasks, and with `baseline=` beside another one.

    Args:
        model: a Hub id, or a directory of a checkpoint or an artifact.
        progress: called with events.

    Returns:
        `summary.evaluation` (`EvalResult`s) and `summary.comparison.rows`, which join them with
        the baseline's.

    Raises:
        CptqError: an option, a task, its data or the model cannot be used.
    """
    settings = _build(EvalSettings, {"model": model, **options})
    outcome: EvalOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(CompareSettings, "model", "others")
def compare(
    model: Source, *others: Source, progress: Emit | None = None, **options: Any
) -> CompareOutcome:
    """Compare the size, quality, speed and memory of several models with the first one.

    Args:
        model: the baseline: a Hub id, a directory, or an eval.json that `evaluate` wrote.
        others: likewise.
        progress: called with events.

    Returns:
        `comparison.models`, each with its results and whether it is on the size-quality front.

    Raises:
        CptqError: an option, a task, its data or a model cannot be used.
    """
    given = {"model": model, "others": tuple(os.fspath(other) for other in others)}
    settings = _build(CompareSettings, {**given, **options})
    outcome: CompareOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(ExportSettings, "artifact", "format")
def export(
    artifact: Source, format: str, *, progress: Emit | None = None, **options: Any
) -> ExportOutcome:
    """Write an artifact in another file format; its integers stay the same.

    Args:
        artifact: a directory that `compress` or `export` wrote.
        format: "compressed-tensors", "packed", "gguf" or "dense".
        progress: called with events.

    Raises:
        CptqError: it is not an artifact, the format cannot hold a layer, or the check fails.
    """
    settings = _build(ExportSettings, {"artifact": artifact, "format": format, **options})
    outcome: ExportOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(SoupSettings, "sources")
def soup(*sources: Source, progress: Emit | None = None, **options: Any) -> SoupOutcome:
    """Average dense or masked checkpoints of one architecture; a common mask is kept.

    Args:
        sources: two directories or more.
        progress: called with events.

    Raises:
        CptqError: a model is compressed, or differs from the first in a tensor or in its zeros.
    """
    given = {"sources": tuple(os.fspath(source) for source in sources)}
    settings = _build(SoupSettings, {**given, **options})
    outcome: SoupOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(BenchSettings, "model", "others")
def bench(
    model: Source, *others: Source, progress: Emit | None = None, **options: Any
) -> BenchOutcome:
    """Measure speed, load time and memory of models, each in a process of its own, in turns.

    Args:
        model: a Hub id, a directory of a checkpoint or an artifact, or a .gguf file.
        others: likewise; their figures are compared with the first model's.
        progress: called with events.

    Returns:
        `bench.models`, each with its `figures` and all their repetitions.

    Raises:
        CptqError: an option or a model cannot be used, or a process ended.
    """
    given = {"model": model, "others": tuple(os.fspath(other) for other in others)}
    settings = _build(BenchSettings, {**given, **options})
    outcome: BenchOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(GenerateSettings, "model", "prompt")
def generate(
    model: Source, prompt: str, *, progress: Emit | None = None, **options: Any
) -> GenerateOutcome:
    """Continue a text with a causal language model, greedily unless `temperature=` is given.

    Args:
        model: a Hub id, or a directory of a checkpoint or an artifact.
        prompt: the text; "-" reads the standard input.
        progress: called with events; `cptq.types.Fragment` is a piece of the text.

    Returns:
        `text`, without the prompt, the numbers of tokens and the seconds they took.

    Raises:
        CptqError: an option or the model cannot be used, or the context does not hold the prompt.
    """
    settings = _build(GenerateSettings, {"model": model, "prompt": prompt, **options})
    outcome: GenerateOutcome = execute(settings, _choose_listener(progress))
    return outcome


@_takes(VerifySettings, "artifact")
def verify(artifact: Source, *, progress: Emit | None = None, **options: Any) -> VerifiedArtifact:
    """Check that an artifact is intact: digests, loading in a fresh process, outputs of its sample.

    Args:
        artifact: a directory that `compress` or `export` wrote.
        progress: called with events.

    Raises:
        CptqError: it is damaged, does not load, or its outputs differ.
    """
    settings = _build(VerifySettings, {"artifact": artifact, **options})
    found: VerifiedArtifact = execute(settings, _choose_listener(progress))
    return found


@_takes(InspectSettings, "path", without=("all_layers",))
def inspect(path: Source, **options: Any) -> Inspection:
    """Read from headers alone what a checkpoint, an artifact or a GGUF file holds.

    Args:
        path: a directory, a .safetensors or a .gguf file.

    Returns:
        Bytes by part and the layers; of a checkpoint that cptq did not write also the `prospect`:
        what `compress` would do with it.

    Raises:
        CptqError: it cannot be read.
    """
    found: Inspection = execute(_build(InspectSettings, {"path": path, **options}), _warn)
    return found
