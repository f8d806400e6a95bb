"""The settings of each command, as immutable values.

Every option stands here (those that commands share, in `cptq.config.inputs`) once: its name, type,
default, help and section. The command line, `--help`, YAML files and programs use these fields, see
`cptq.config.options`. A settings value that exists is acceptable: the constructors check what needs
no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cptq.config.candidates import (
    ALLOCATORS,
    COMPRESSORS,
    METRICS,
    CandidateSettings,
    PlanningSettings,
)
from cptq.config.checks import (
    check_repository,
    parse_activation_sparsity,
    parse_shard_size,
)
from cptq.config.inputs import (
    data_dir_option,
    max_shard_size_option,
    out_option,
    overwrite_option,
    push_to_hub_option,
    resume_option,
    token_option,
    trust_remote_code_option,
)
from cptq.config.options import (
    ARGUMENTS,
    CANDIDATES,
    OUTPUT,
    PLAN,
    SENSITIVITY,
    VALIDATION,
    describe_option,
    find_flag,
    option,
)
from cptq.config.running import (
    BenchSettings,
    CompareSettings,
    EvalSettings,
    GenerateSettings,
    RunSettings,
)
from cptq.errors import UsageError

DEFAULT_PAIRS = 96
DEFAULT_TUNE_MINUTES = 10
DEFAULT_TARGETS = ("2.5bit", "3bit", "4bit")
#: the metric that measures what the others estimate, with the compressor of the run
GROUND_TRUTH = "kl"

SCORES, PROFILES = "cptq.compression.scores:SCORES", "cptq.allocation.profiles:PROFILES"
DEFAULT_SCORE, DEFAULT_PROFILE = "wanda", "uniform"
ACTIVATION_METHODS = "cptq.activation_sparsity:METHODS"
FORMATS = "cptq.artifact.formats:FORMATS"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeSettings(CandidateSettings):
    """`cptq analyze`. `runtime` restricts the candidates; layers of any runtime are measured."""

    metrics: tuple[str, ...] = option(
        ("output",),
        "Score the layers by this metric. all: every metric except kl.",
        SENSITIVITY,
        "NAME",
        flags=("--metric",),
        registry=METRICS,
        allowed="all",
    )
    sensitivity: tuple[Path, ...] = option(
        (),
        "Use the scores of this earlier analysis (its directory, or one of its "
        "sensitivity/METRIC.json) instead of measuring them again.",
        SENSITIVITY,
        "PATH",
    )
    validate: bool = option(
        False,
        "Measure the true damage of a sample of layers and of whole plans, and report how well the "
        "scores predict it.",
        VALIDATION,
    )
    pairs: int = option(
        DEFAULT_PAIRS,
        "Measure N pairs of a layer and a bit width. Needs --validate.",
        VALIDATION,
        "N",
        minimum=1,
    )
    targets: tuple[str, ...] = option(
        DEFAULT_TARGETS,
        "Compare plans of this size. Needs --validate.",
        VALIDATION,
        "SIZE",
        flags=("--target",),
    )
    allocators: tuple[str, ...] = option(
        ("knapsack",),
        "Compare plans of this allocator. Needs --validate.",
        VALIDATION,
        "NAME",
        flags=("--allocator",),
        registry=ALLOCATORS,
    )
    compressor: str = option(
        "gptaq",
        "Carry out plans, and the trials of --metric kl, by this method; nearest is faster. Needs "
        "--validate or --metric kl.",
        VALIDATION,
        "NAME",
        registry=COMPRESSORS,
    )
    sparsity_analysis: bool = option(
        False,
        "Measure how sparse weights and activations are and can become, too: sparsity/*.json and "
        "figures in the report.",
        SENSITIVITY,
    )
    out: Path | None = out_option(
        "Write scores and reports to this directory.", "DIR", "MODEL-analysis"
    )
    overwrite: bool = overwrite_option()
    resume: bool = resume_option()

    #: options that have no effect without `validate`, and their defaults
    _OF_VALIDATION: ClassVar[Mapping[str, object]] = {
        "pairs": DEFAULT_PAIRS,
        "targets": DEFAULT_TARGETS,
        "allocators": ("knapsack",),
    }

    def __post_init__(self) -> None:
        CandidateSettings.__post_init__(self)  # `super()` fails in a dataclass with slots
        if not self.metrics:
            raise UsageError("no metric is given", hint="type for example --metric output")
        for name, usual in self._OF_VALIDATION.items():
            if not self.validate and getattr(self, name) != usual:
                flag = find_flag(type(self), name)
                raise UsageError(f"{flag} has no effect without --validate", hint="add --validate")
        if self.compressor != "gptaq" and not (self.validate or GROUND_TRUTH in self.metrics):
            raise UsageError(
                f"--compressor has no effect without --validate or --metric {GROUND_TRUTH}",
                hint="add --validate",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressSettings(PlanningSettings):
    """`cptq compress`. With a `plan`, `target` is None: the plan holds its own budget."""

    target: str | None = option(
        "4bit",
        "Set the target size: 4bit, 3.5bit, 3.5bpw, 25% or 120MB. The file is never larger.",
        PLAN,
        "SIZE",
        flags=("--target", "-t"),
        fixed_by=("plan",),
    )
    sparsity_score: str = option(
        DEFAULT_SCORE,
        "Choose the weights that become zero by this score. Needs --sparsity or --plan.",
        CANDIDATES,
        "NAME",
        registry=SCORES,
    )
    sparsity_profile: str = option(
        DEFAULT_PROFILE,
        "Spread the zeros over the layers that become sparse by this profile, in no more bytes. "
        "Needs --sparsity.",
        CANDIDATES,
        "NAME",
        registry=PROFILES,
        fixed_by=("plan",),
    )
    activation_sparsity: str | None = option(
        None,
        "Drop a share of the inputs of the linears at run time: METHOD:SHARE such as teal:50%, or "
        "exact for models with ReLU. Needs --runtime cptq.",
        CANDIDATES,
        "METHOD",
        registry=ACTIVATION_METHODS,
    )
    plan: Path | None = option(
        None, "Compress by this plan.json instead of planning for --target.", PLAN, "FILE"
    )
    refine: int = option(
        0,
        "Try N swaps of bits between layers on the whole model and keep those that help.",
        PLAN,
        "N",
        minimum=0,
        fixed_by=("plan",),
    )
    check_uniform: bool = option(
        True,
        "Try the uniform baseline plan of the same size too, and ship the better of the two.",
        PLAN,
    )
    evaluate: bool = option(
        True,
        "Measure what the result lost, on text that did not calibrate, and its speed.",
        PLAN,
        flags=("--eval",),
    )
    tune: bool = option(
        False, "Tune scales, norms and biases by the divergence from the dense model.", PLAN
    )
    tune_minutes: int = option(
        DEFAULT_TUNE_MINUTES, "Tune for at most N minutes. Needs --tune.", PLAN, "N", minimum=1
    )
    out: Path | None = out_option(
        "Write the artifact to this directory.", "DIR", "MODEL-cptq-TARGET"
    )
    overwrite: bool = overwrite_option()
    resume: bool = resume_option()
    push_to_hub: str | None = push_to_hub_option()
    allow_larger: bool = option(
        False, "Go on where the result may take more bytes than the model does.", OUTPUT
    )
    dry_run: bool = option(
        False,
        "Print what the run would write, hold in memory and take, and stop before any work.",
        OUTPUT,
    )

    def __post_init__(self) -> None:
        PlanningSettings.__post_init__(self)
        check_repository(self.push_to_hub)
        if self.tune_minutes != DEFAULT_TUNE_MINUTES and not self.tune:
            raise UsageError("--tune-minutes has no effect without --tune", hint="add --tune")
        self._check_sparsity()
        if self.activation_sparsity is not None:
            parse_activation_sparsity(self.activation_sparsity)

    def _check_sparsity(self) -> None:
        if self.sparsity_score != DEFAULT_SCORE and not (self.sparsity or self.plan):
            raise UsageError(
                "--sparsity-score has no effect without --sparsity", hint="add --sparsity 50%"
            )
        if self.sparsity_profile != DEFAULT_PROFILE and not self.sparsity:
            raise UsageError(
                "--sparsity-profile has no effect without --sparsity", hint="add --sparsity 50%"
            )
        if self.sparsity_score == "sparsegpt" and self.compressor == "nearest":
            raise UsageError(
                "--sparsity-score sparsegpt chooses inside the column sweep, which --compressor "
                "nearest does not have",
                allowed="--compressor gptq or gptaq, or another --sparsity-score",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings(PlanningSettings):
    """`cptq plan`: plans of several sizes from one measurement, before any work.

    `model` may name the directory of an analysis; `config.analysis` then fills in what it was
    measured with.
    """

    targets: tuple[str, ...] = option(
        ("4bit",),
        "Make a plan of this size: 4bit, 3.5bit, 3.5bpw, 25% or 120MB.",
        PLAN,
        "SIZE",
        flags=("--target", "-t"),
    )
    edits: tuple[str, ...] = option(
        (),
        "Give this unit these bits (4) or this way to be stored (w4g64) after the plans are made.",
        PLAN,
        "UNIT=BITS",
        flags=("--set",),
    )
    explain: tuple[str, ...] = option(
        (),
        "Explain the choice for this unit: what one bit more or less costs, and what it buys.",
        PLAN,
        "UNIT",
    )
    out: Path | None = out_option(
        "Write the plans (TARGET.json, for cptq compress --plan), the front of size against "
        "predicted loss (front.svg) and the scores to this directory."
    )
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        PlanningSettings.__post_init__(self)
        if not self.targets:
            raise UsageError("no target is given", hint="type for example --target 4bit")
        for words in self.edits:
            parse_edit(words)


def parse_edit(text: str) -> tuple[str, str]:
    """Read UNIT=BITS.

    Raises:
        UsageError: it has another form.
    """
    unit, sign, choice = text.rpartition("=")
    if not (unit.strip() and sign and choice.strip()):
        raise UsageError(
            f"--set is {text!r}",
            allowed="UNIT=BITS, such as model.layers.0.mlp.down_proj=8, or =w4g64",
        )
    return unit.strip(), choice.strip().removesuffix("bit")


_ARTIFACT = describe_option(
    "The artifact.", ARGUMENTS, "ARTIFACT", allowed="a directory that cptq wrote"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """`cptq export`: write an artifact in another file format."""

    artifact: Path = field(metadata=_ARTIFACT)
    format: str = field(
        metadata=describe_option("Write this file format.", OUTPUT, "NAME", registry=FORMATS)
    )
    out: Path | None = out_option("Write to this directory.", "DIR", "ARTIFACT-FORMAT")
    overwrite: bool = overwrite_option()
    max_shard_size: str = max_shard_size_option()
    push_to_hub: str | None = push_to_hub_option()
    token: str | None = token_option()
    trust_remote_code: bool = trust_remote_code_option()

    def __post_init__(self) -> None:
        check_repository(self.push_to_hub)
        parse_shard_size(self.max_shard_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectSettings:
    """`cptq inspect`: show what a checkpoint, an artifact or a GGUF file holds, and what `compress`
    would do with a checkpoint."""

    path: Path = field(
        metadata=describe_option(
            "The weights to look into.",
            ARGUMENTS,
            "PATH",
            allowed="a directory, a .safetensors file or a .gguf file",
        )
    )
    all_layers: bool = option(
        False, "List every layer, instead of counting equal ones.", OUTPUT, flags=("--all",)
    )
    trust_remote_code: bool = trust_remote_code_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """`cptq verify`: check an artifact against its manifest."""

    artifact: Path = field(metadata=_ARTIFACT)
    trust_remote_code: bool = trust_remote_code_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class SoupSettings:
    """`cptq soup`: average checkpoints of one architecture and, if masked, one mask."""

    sources: tuple[str, ...] = option(
        (),
        "The models to average, two or more: directories of dense checkpoints.",
        ARGUMENTS,
        "MODEL...",
    )
    out: Path | None = out_option("Write the average to this directory.", "DIR", "MODEL-soup")
    overwrite: bool = overwrite_option()

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            raise UsageError("a soup needs two models or more", hint="type cptq soup A B -o OUT")
        if len(set(self.sources)) < len(self.sources):
            raise UsageError("a model is given twice", hint="name each model once")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """`cptq doctor`: what is installed, what the machine has, and what is missing."""

    data_dir: Path | None = data_dir_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodsSettings:
    """`cptq methods`: what can be chosen, with sources, costs and measurements."""

    names: tuple[str, ...] = option(
        (),
        "Show these alone: a kind (metric, allocator, compressor, format, runtime, task), or a "
        "name. One to three names are shown with all facts.",
        ARGUMENTS,
        "NAME...",
        usual="all",
    )


Settings = AnalyzeSettings | CompressSettings | EvalSettings | CompareSettings
AnySettings = (
    Settings
    | PlanSettings
    | ExportSettings
    | InspectSettings
    | VerifySettings
    | RunSettings
    | DoctorSettings
    | MethodsSettings
    | SoupSettings
)
COMMANDS: Mapping[type, str] = {
    AnalyzeSettings: "analyze",
    PlanSettings: "plan",
    CompressSettings: "compress",
    EvalSettings: "eval",
    ExportSettings: "export",
    SoupSettings: "soup",
    InspectSettings: "inspect",
    VerifySettings: "verify",
    CompareSettings: "compare",
    BenchSettings: "bench",
    GenerateSettings: "generate",
    DoctorSettings: "doctor",
    MethodsSettings: "methods",
}
