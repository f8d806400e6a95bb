"""The settings of a run, as immutable values; strict YAML for `--config`.

Every field has a default that works; the command line and a YAML file fill the same fields, the
command line wins. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_GROUP_SIZE = 64
DEFAULT_BITS = (2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Where the model comes from and how it runs."""

    model: str
    device: str = "auto"
    dtype: str = "auto"  # the type it runs in; auto = float32 on a CPU, the checkpoint's on a GPU
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """Which text flows through the model while it is measured and compressed."""

    calibration: str = "auto"  # auto | wikitext | pydoc | glue/<task> | path of a .txt or .tsv file
    data_dir: Path | None = None
    samples: int = 64
    seqlen: int = 512
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeSettings:
    """`cptq analyze`."""

    model: ModelSettings
    calibration: CalibrationSettings
    metrics: tuple[str, ...] = ("output",)
    bits: tuple[int, ...] = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressSettings:
    """`cptq compress`."""

    model: ModelSettings
    calibration: CalibrationSettings
    target: str | None = "4bit"
    metric: str = "output"
    allocator: str = "knapsack"
    compressor: str = "gptq"
    bits: tuple[int, ...] = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    plan: Path | None = None
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """`cptq eval`. `limit` <= 1 is a share of the samples, above 1 a count."""

    model: ModelSettings
    tasks: tuple[str, ...] = ("wikitext",)
    baseline: str | None = None
    limit: float | None = None
    seqlen: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False
