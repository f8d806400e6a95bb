"""What `analyze`, `compress` and `plan` share: the model, its candidates, and planning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cptq.config.checks import check_bits, parse_max_memory, parse_shard_size, parse_sparsity
from cptq.config.inputs import (
    CalibrationSettings,
    ModelSettings,
    max_memory_option,
    max_shard_size_option,
)
from cptq.config.options import CANDIDATES, CONSTRAINTS, PLAN, check_options, find_flag, option
from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, Runtime, find_runtime
from cptq.errors import UsageError

DEFAULT_GROUP_SIZE = RUNTIMES[DEFAULT_RUNTIME].group_size
DEFAULT_BITS = RUNTIMES[DEFAULT_RUNTIME].default_bits
#: values of --scales
SCALE_KINDS = ("auto", "16bit")
#: values of --levels
LEVEL_KINDS = ("auto", "even")

METRICS, ALLOCATORS = "cptq.sensitivity:METRICS", "cptq.allocation:ALLOCATORS"
COMPRESSORS = "cptq.compression:COMPRESSORS"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSettings:
    """A dense model, its calibration and the ways to store its layers."""

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
        "where the runtime takes them and they lose less; llamacpp: 3 and 6 bits, by its K-types).",
        CANDIDATES,
        "KIND",
        choices=SCALE_KINDS,
        fixed_by=("plan",),
    )
    levels: str = option(
        "auto",
        "Space the values of a weight evenly (even), or closer around 0 (auto: where the runtime "
        "takes that and they lose less: cptq at 2 to 6 bits, llamacpp at 4).",
        CANDIDATES,
        "KIND",
        choices=LEVEL_KINDS,
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
        "Offer each bit width with zeros too: N of every M inputs kept (2:4, 4:8), a share "
        "of zeros (50%), or several (commas). Needs --runtime cptq.",
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
        restricted = ("asymmetric", "sparsity", "embedding_bits", "activation_sparsity")
        given = [name for name in restricted if getattr(self, name, None)]
        runtime.check_wider(*(find_flag(type(self), name) for name in given))
        if self.asymmetric and not set(self.bits) & set(runtime.asymmetric):
            raise UsageError(
                f"--asymmetric has no effect at --bits {','.join(map(str, self.bits))}",
                allowed=f"--bits with one of {', '.join(map(str, runtime.asymmetric))}",
            )
        if self.scales == "16bit" and self.bits != runtime.default_bits:
            _check_16bit_scales("--bits", self.bits, runtime)
        for word in self.sparsity:
            parse_sparsity(word)


def _check_16bit_scales(flag: str, bits: Iterable[int], runtime: Runtime) -> None:
    """Refuse given widths that the runtime has with other scales than --scales 16bit asks for.

    Raises:
        UsageError: names the widths.
    """
    wrong = [width for width in bits if width in runtime.super_bits]
    if wrong:
        raise UsageError(
            f"{flag} names {', '.join(map(str, wrong))}, which --runtime {runtime.name} does not "
            "take with --scales 16bit",
            allowed=f"--scales auto, or {', '.join(map(str, runtime.list_16bit_widths()))}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningSettings(CandidateSettings):
    """What `compress` and `plan` share: scores, the allocator, and what bounds its choice. With
    `sensitivity`, a table that `analyze` wrote, its metric is used and nothing is measured."""

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
        "cptq, 3, 4, 5, 6 or 8 with llamacpp, 8 (floats) with transformers; 16 keeps them dense.",
        CANDIDATES,
        "N",
        usual="chosen with the layers' widths",
        fixed_by=("plan",),
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
    max_shard_size: str = max_shard_size_option()

    def __post_init__(self) -> None:
        CandidateSettings.__post_init__(self)  # `super()` fails in a dataclass with slots
        parse_shard_size(self.max_shard_size)
        widths = (*find_runtime(self.runtime).list_vocabulary_bits(), 16)
        if self.embedding_bits is not None and self.embedding_bits not in widths:
            raise UsageError(
                f"--embedding-bits is {self.embedding_bits}",
                allowed=f"{', '.join(map(str, widths))} with --runtime {self.runtime}",
            )
        if self.scales == "16bit" and self.embedding_bits is not None:
            runtime = find_runtime(self.runtime)
            _check_16bit_scales("--embedding-bits", [self.embedding_bits], runtime)
