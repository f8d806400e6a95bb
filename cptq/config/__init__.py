"""The settings of a run: immutable values, filled by the command line and by strict YAML."""

from cptq.config.checks import ALLOWED_BITS, check_repository, option, parse_sparsity
from cptq.config.file import read_file, settings_from
from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, Runtime, find_runtime
from cptq.config.settings import (
    DEFAULT_BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_PAIRS,
    DEFAULT_TARGETS,
    DTYPES,
    AnalyzeSettings,
    CalibrationSettings,
    CompareSettings,
    CompressSettings,
    EvalSettings,
    ExportSettings,
    ModelSettings,
    Settings,
)
from cptq.config.values import build, command_line, convert, describe, flat_fields

__all__ = [
    "ALLOWED_BITS",
    "DEFAULT_BITS",
    "DEFAULT_GROUP_SIZE",
    "DEFAULT_PAIRS",
    "DEFAULT_RUNTIME",
    "DEFAULT_TARGETS",
    "DTYPES",
    "RUNTIMES",
    "AnalyzeSettings",
    "CalibrationSettings",
    "CompareSettings",
    "CompressSettings",
    "EvalSettings",
    "ExportSettings",
    "ModelSettings",
    "Runtime",
    "Settings",
    "build",
    "check_repository",
    "command_line",
    "convert",
    "describe",
    "find_runtime",
    "flat_fields",
    "option",
    "parse_sparsity",
    "read_file",
    "settings_from",
]
