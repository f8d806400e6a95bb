"""The settings of a run, as immutable values.

Every field has a default that works. A settings value that exists is acceptable: the constructors
check what needs no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cptq.config.checks import (
    at_least,
    check_bits,
    check_limit,
    check_repository,
    option,
    parse_sparsity,
)
from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, Runtime, find_runtime
from cptq.errors import UsageError
from cptq.registry import find_closest

DEFAULT_GROUP_SIZE = RUNTIMES[DEFAULT_RUNTIME].group_size
DEFAULT_BITS = RUNTIMES[DEFAULT_RUNTIME].default_bits
DEFAULT_TASKS = ("wikitext",)
#: whether a mixed plan must beat the uniform one of the same bytes before it is shipped
CHECK_UNIFORM = True
#: pairs of unit and candidate whose truth --validate measures, and the sizes that it plans for
DEFAULT_PAIRS = 96
DEFAULT_TARGETS = ("2.5bit", "3bit", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: what a file already says; given beside it they would be ignored, so they are refused
FIXED_BY = {
    "plan": (
        "target",
        "metric",
        "allocator",
        "bits",
        "group_size",
        "sparsity",
        "asymmetric",
        "embedding_bits",
        "sensitivity",
        "pins",
        "min_bits",
        "max_bits",
        "refine",
    ),
    "sensitivity": ("metric",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Where the model comes from and how it runs."""

    model: str
    device: str = "auto"
    dtype: str = "auto"  # the type it runs in; auto = float32 on a CPU, the checkpoint's on a GPU
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("the name of the model is empty", allowed="a Hub id or a directory")
        if self.dtype not in DTYPES:
            near = find_closest(self.dtype, list(DTYPES))
            hint = f"did you mean {near!r}?" if near else None
            raise UsageError(f"--dtype is {self.dtype!r}", allowed=", ".join(DTYPES), hint=hint)
        if not re.fullmatch(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?", self.device):
            raise UsageError(f"--device is {self.device!r}", allowed="auto, cpu, cuda, cuda:N, mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """Which text flows through the model while it is measured and compressed."""

    calibration: str = "auto"  # auto | wikitext | pydoc | glue/<task> | path of a .txt or .tsv file
    data_dir: Path | None = None
    samples: int = 64
    seqlen: int = 512
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, seqlen=self.seqlen, batch_size=self.batch_size)
        at_least(0, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeSettings:
    """`cptq analyze`."""

    model: ModelSettings
    calibration: CalibrationSettings
    metrics: tuple[str, ...] = ("output",)
    sensitivity: tuple[Path, ...] = ()  # tables, or directories of them, that need no measuring
    runtime: str = DEFAULT_RUNTIME  # of the candidates; every layer that some runtime takes counts
    bits: tuple[int, ...] = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    asymmetric: bool = False
    sparsity: tuple[str, ...] = ()  # each `2:4`, or a share such as `50%`
    validate: bool = False
    pairs: int = DEFAULT_PAIRS
    targets: tuple[str, ...] = DEFAULT_TARGETS
    allocators: tuple[str, ...] = ("knapsack",)
    compressor: str = "nearest"
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        runtime = find_runtime(self.runtime)
        check_bits(self.bits)
        at_least(0, group_size=self.group_size)
        runtime.check(self.bits, self.group_size)
        _check_wider(runtime, self)
        at_least(1, pairs=self.pairs)
        if not self.metrics:
            raise UsageError("no metric is given", hint="--metric output")
        if not self.validate:
            self._refuse_words_of_validation()

    def _refuse_words_of_validation(self) -> None:
        """An option that would do nothing is a mistake."""
        usual = {
            "pairs": DEFAULT_PAIRS,
            "targets": DEFAULT_TARGETS,
            "allocators": ("knapsack",),
            "compressor": "nearest",
        }
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise UsageError(
                    f"{option(name)} does nothing without --validate", hint="add --validate"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressSettings:
    """`cptq compress`. With a `plan`, `target` is None: the plan holds its own budget. With
    `sensitivity`, a table that `analyze` wrote, its metric counts and nothing is measured."""

    model: ModelSettings
    calibration: CalibrationSettings
    target: str | None = "4bit"
    metric: str = "output"
    allocator: str = "knapsack"
    compressor: str = "gptq"
    runtime: str = DEFAULT_RUNTIME
    bits: tuple[int, ...] = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    asymmetric: bool = False
    sparsity: tuple[str, ...] = ()  # each `2:4`, or a share such as `50%`
    embedding_bits: int | None = None  # also of an output head; None keeps them dense
    plan: Path | None = None
    sensitivity: Path | None = None
    push_to_hub: str | None = None
    pins: tuple[str, ...] = ()  # each `regex=8bit`
    min_bits: tuple[str, ...] = ()  # each a number, or `role=number`
    max_bits: tuple[str, ...] = ()
    refine: int = 0  # how many whole-model measurements a search for a better plan may take
    check_uniform: bool = CHECK_UNIFORM
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        runtime = find_runtime(self.runtime)
        check_bits(self.bits)
        at_least(0, group_size=self.group_size)
        runtime.check(self.bits, self.group_size)
        _check_wider(runtime, self)
        at_least(0, refine=self.refine)
        check_repository(self.push_to_hub)
        if self.embedding_bits is not None and self.embedding_bits not in runtime.embeddings:
            raise UsageError(
                f"--embedding-bits is {self.embedding_bits}",
                allowed=f"{', '.join(map(str, runtime.embeddings))} (an output head, which most "
                "models share with the embedding, suffers from fewer)",
            )


def _check_wider(runtime: Runtime, settings: AnalyzeSettings | CompressSettings) -> None:
    """Options that only some runtimes take, and the words of --sparsity."""
    names = ("asymmetric", "sparsity", "embedding_bits")
    runtime.check_wider(*(option(name) for name in names if getattr(settings, name, None)))
    if settings.asymmetric and not set(settings.bits) & set(runtime.asymmetric):
        raise UsageError(
            f"--asymmetric does nothing at --bits {','.join(map(str, settings.bits))}",
            allowed=f"with one of {', '.join(map(str, runtime.asymmetric))} among them",
        )
    for word in settings.sparsity:
        parse_sparsity(word)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """`cptq eval`. `limit` <= 1 is a share of the samples, above 1 a count.

    Where no task is given it is wikitext, unless `lm_eval` names tasks of lm-evaluation-harness.
    """

    model: ModelSettings
    tasks: tuple[str, ...] = ()
    lm_eval: tuple[str, ...] = ()
    baseline: str | None = None
    limit: float | None = None
    seqlen: int | None = None
    stride: int | None = None  # windows roll over a text, each predicting this many tokens
    batch_size: int = 8
    data_dir: Path | None = None
    seed: int = 0
    strict: bool = False  # text that calibrated and is evaluated is an error, not a warning
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)
        at_least(2, seqlen=self.seqlen)
        at_least(1, stride=self.stride)
        at_least(0, seed=self.seed)
        if not self.tasks and not self.lm_eval:
            object.__setattr__(self, "tasks", DEFAULT_TASKS)
        check_limit(self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """`cptq compare`: `model` is the first, which the `others` are held to; each is a model, an
    artifact, or the eval.json of one. `tasks` are for those that must still be measured."""

    model: ModelSettings
    others: tuple[str, ...] = ()
    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: float | None = None
    no_footprint: bool = False
    seqlen: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    seed: int = 0
    strict: bool = False
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)
        at_least(2, seqlen=self.seqlen)
        at_least(0, seed=self.seed)
        check_limit(self.limit)
        if not self.tasks:
            raise UsageError("no task is given", hint="--task wikitext")
        if not self.others:
            raise UsageError("there is one model, and nothing to compare it with", hint="name two")
        if len(set(self.sources)) < len(self.sources):
            raise UsageError("a model is named twice", hint="name each once")

    @property
    def sources(self) -> tuple[str, ...]:
        """All models, the first first."""
        return (self.model.model, *self.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """`cptq export`: an artifact in another file format."""

    artifact: Path
    format: str
    out: Path | None = None
    overwrite: bool = False
    push_to_hub: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_repository(self.push_to_hub)


Settings = AnalyzeSettings | CompressSettings | EvalSettings | CompareSettings
COMMANDS: Mapping[type, str] = {
    AnalyzeSettings: "analyze",
    CompressSettings: "compress",
    EvalSettings: "eval",
    CompareSettings: "compare",
}
