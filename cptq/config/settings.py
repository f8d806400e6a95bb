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

from cptq.config.checks import (
    check_bits,
    check_repository,
    parse_max_memory,
    parse_shard_size,
    parse_sparsity,
)
from cptq.config.inputs import (
    CalibrationSettings,
    ModelSettings,
    max_memory_option,
    max_shard_size_option,
    out_option,
    overwrite_option,
    push_to_hub_option,
    token_option,
    trust_remote_code_option,
)
from cptq.config.options import (
    ARGUMENTS,
    CANDIDATES,
    CONSTRAINTS,
    OUTPUT,
    PLAN,
    SENSITIVITY,
    VALIDATION,
    check_options,
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
from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, find_runtime
from cptq.errors import UsageError

DEFAULT_GROUP_SIZE = RUNTIMES[DEFAULT_RUNTIME].group_size
DEFAULT_BITS = RUNTIMES[DEFAULT_RUNTIME].default_bits
#: values of --scales
SCALE_KINDS = ("auto", "16bit")
DEFAULT_PAIRS = 96
DEFAULT_TUNE_MINUTES = 10
DEFAULT_TARGETS = ("2.5bit", "3bit", "4bit")
#: the metric that measures what the others estimate, with the compressor of the run
GROUND_TRUTH = "kl"

METRICS, ALLOCATORS = "cptq.sensitivity:METRICS", "cptq.allocation:ALLOCATORS"
COMPRESSORS, FORMATS = "cptq.compression:COMPRESSORS", "cptq.artifact.formats:FORMATS"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSettings:
    """What `analyze` and `compress` share: a dense model, its calibration and its candidates."""

    model: ModelSettings
    calibration: CalibrationSettings
    runtime: str = option(
        DEFAULT_RUNTIME,
        "Use only what this runtime loads.",
        CANDIDATES,
        "NAME",
        allowed=", ".join(RUNTIMES),
    )
    bits: tuple[int, ...] = option(
        DEFAULT_BITS,
        "Choose from these bit widths, separated by commas: 2 to 8, or 16 for a dense layer.",
        CANDIDATES,
        "LIST",
        commas=True,
        fixed_by=("plan",),
        usual=f"{','.join(map(str, DEFAULT_BITS))}, or those of them that --runtime takes",
    )
    group_size: int = option(
        DEFAULT_GROUP_SIZE,
        "Share a 16-bit scale among N inputs, a narrower one among N/2. 0: one per output channel.",
        CANDIDATES,
        "N",
        minimum=0,
        fixed_by=("plan",),
        usual=f"{DEFAULT_GROUP_SIZE}, or {RUNTIMES['llamacpp'].group_size} for llamacpp",
    )
    scales: str = option(
        "auto",
        "Store scales in 16 bits each (16bit), or in 8 or 6 for groups of half the size (auto: "
        "where the runtime takes them and they lose less).",
        CANDIDATES,
        "KIND",
        choices=SCALE_KINDS,
        fixed_by=("plan",),
    )
    asymmetric: bool = option(
        False,
        "Use grids with a zero point. Needs --runtime cptq or llamacpp.",
        CANDIDATES,
        fixed_by=("plan",),
    )
    sparsity: tuple[str, ...] = option(
        (),
        "Offer each bit width with a share of zeros too: 2:4, 50%, or both, separated by a comma. "
        "Needs --runtime cptq.",
        CANDIDATES,
        "LIST",
        commas=True,
        fixed_by=("plan",),
        usual="none, as it gains little at most sizes",
    )

    max_memory: str | None = max_memory_option()

    def __post_init__(self) -> None:
        check_options(self)
        parse_max_memory(self.max_memory)
        runtime = find_runtime(self.runtime)
        check_bits(self.bits)
        runtime.check(self.bits, self.group_size)
        restricted = ("asymmetric", "sparsity", "embedding_bits")
        given = [name for name in restricted if getattr(self, name, None)]
        runtime.check_wider(*(find_flag(type(self), name) for name in given))
        if self.asymmetric and not set(self.bits) & set(runtime.asymmetric):
            raise UsageError(
                f"--asymmetric has no effect at --bits {','.join(map(str, self.bits))}",
                allowed=f"--bits with one of {', '.join(map(str, runtime.asymmetric))}",
            )
        for word in self.sparsity:
            parse_sparsity(word)


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
    out: Path | None = out_option(
        "Write scores and reports to this directory.", "DIR", "MODEL-analysis"
    )
    overwrite: bool = overwrite_option()

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
class CompressSettings(CandidateSettings):
    """`cptq compress`. With a `plan`, `target` is None: the plan holds its own budget. With
    `sensitivity`, a table that `analyze` wrote, its metric is used and nothing is measured."""

    target: str | None = option(
        "4bit",
        "Set the target size: 4bit, 3.5bit, 3.5bpw, 25% or 120MB. The file is never larger.",
        PLAN,
        "SIZE",
        flags=("--target", "-t"),
        fixed_by=("plan",),
    )
    metric: str = option(
        "output",
        "Score the layers by this metric.",
        PLAN,
        "NAME",
        registry=METRICS,
        fixed_by=("plan", "sensitivity"),
    )
    allocator: str = option(
        "knapsack",
        "Choose the bit widths by this method. uniform and even need no scores.",
        PLAN,
        "NAME",
        registry=ALLOCATORS,
        fixed_by=("plan",),
    )
    compressor: str = option(
        "gptaq", "Quantize by this method.", PLAN, "NAME", registry=COMPRESSORS
    )
    embedding_bits: int | None = option(
        None,
        "Store the token embeddings and the output head in exactly N bits: 3 to 8 with --runtime "
        "cptq, 4, 5 or 8 with llamacpp, 8 (floats) with transformers; 16 keeps them dense.",
        CANDIDATES,
        "N",
        usual="chosen with the layers' widths",
        fixed_by=("plan",),
    )
    plan: Path | None = option(
        None, "Compress by this plan.json instead of planning for --target.", PLAN, "FILE"
    )
    sensitivity: Path | None = option(
        None,
        "Use the scores in this sensitivity/METRIC.json of cptq analyze instead of measuring them.",
        PLAN,
        "FILE",
        fixed_by=("plan",),
    )
    pins: tuple[str, ...] = option(
        (),
        "Give the layers whose name matches REGEX exactly this width, as in 'down_proj=8bit'.",
        CONSTRAINTS,
        "REGEX=BITS",
        flags=("--pin",),
        fixed_by=("plan",),
    )
    min_bits: tuple[str, ...] = option(
        (),
        "Give all layers, or those of a role as in down=4, at least N bits.",
        CONSTRAINTS,
        "[ROLE=]N",
        fixed_by=("plan",),
    )
    max_bits: tuple[str, ...] = option(
        (),
        "Give all layers, or those of a role as in down=4, at most N bits.",
        CONSTRAINTS,
        "[ROLE=]N",
        fixed_by=("plan",),
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
        "Compress by the uniform baseline plan of the same size too, and keep the better result.",
        PLAN,
    )
    evaluate: bool = option(
        True,
        "Measure on text that does not calibrate what the result lost, for the report.",
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
    resume: bool = option(
        False,
        "Go on with a run of this very command that was interrupted, killed or failed, from the "
        "steps that it finished.",
        OUTPUT,
    )
    max_shard_size: str = max_shard_size_option()
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
        CandidateSettings.__post_init__(self)
        check_repository(self.push_to_hub)
        parse_shard_size(self.max_shard_size)
        if self.tune_minutes != DEFAULT_TUNE_MINUTES and not self.tune:
            raise UsageError("--tune-minutes has no effect without --tune", hint="add --tune")
        widths = (*find_runtime(self.runtime).list_vocabulary_bits(), 16)
        if self.embedding_bits is not None and self.embedding_bits not in widths:
            raise UsageError(
                f"--embedding-bits is {self.embedding_bits}",
                allowed=f"{', '.join(map(str, widths))} with --runtime {self.runtime}",
            )


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


Settings = AnalyzeSettings | CompressSettings | EvalSettings | CompareSettings
AnySettings = Settings | ExportSettings | InspectSettings | VerifySettings | RunSettings
COMMANDS: Mapping[type, str] = {
    AnalyzeSettings: "analyze",
    CompressSettings: "compress",
    EvalSettings: "eval",
    ExportSettings: "export",
    InspectSettings: "inspect",
    VerifySettings: "verify",
    CompareSettings: "compare",
    BenchSettings: "bench",
    GenerateSettings: "generate",
}
