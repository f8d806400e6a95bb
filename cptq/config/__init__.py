"""The settings of a run: immutable values, filled by the command line, YAML files or programs."""

from cptq.config.checks import ALLOWED_BITS, check_repository, parse_size, parse_sparsity
from cptq.config.inputs import DTYPES, CalibrationSettings, ModelSettings
from cptq.config.options import Option, find_flag, list_options
from cptq.config.running import (
    GGUF,
    BenchSettings,
    CompareSettings,
    EvalSettings,
    GenerateSettings,
)
from cptq.config.runtimes import DEFAULT_RUNTIME, RUNTIMES, Runtime, find_runtime
from cptq.config.settings import (
    DEFAULT_BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_PAIRS,
    DEFAULT_TARGETS,
    GROUND_TRUTH,
    AnalyzeSettings,
    AnySettings,
    CompressSettings,
    ExportSettings,
    InspectSettings,
    Settings,
    VerifySettings,
)
from cptq.config.values import (
    build,
    command_line,
    convert,
    describe,
    flat_fields,
    name_fields,
    read_file,
    settings_from,
)

__all__ = [
    "ALLOWED_BITS",
    "DEFAULT_BITS",
    "DEFAULT_GROUP_SIZE",
    "DEFAULT_PAIRS",
    "DEFAULT_RUNTIME",
    "DEFAULT_TARGETS",
    "DTYPES",
    "GGUF",
    "GROUND_TRUTH",
    "RUNTIMES",
    "AnalyzeSettings",
    "AnySettings",
    "BenchSettings",
    "CalibrationSettings",
    "CompareSettings",
    "CompressSettings",
    "EvalSettings",
    "ExportSettings",
    "GenerateSettings",
    "InspectSettings",
    "ModelSettings",
    "Option",
    "Runtime",
    "Settings",
    "VerifySettings",
    "build",
    "check_repository",
    "command_line",
    "convert",
    "describe",
    "find_flag",
    "find_runtime",
    "flat_fields",
    "list_options",
    "name_fields",
    "parse_size",
    "parse_sparsity",
    "read_file",
    "settings_from",
]
