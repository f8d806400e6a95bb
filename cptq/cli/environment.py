"""The process environment that torch and transformers read when they are imported.

Only defaults are set; variables that the user has set stay as they are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, MutableMapping
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

#: idle OpenMP threads spin for some microseconds before they sleep. Without spinning, small tensors
#: take up to 7 times as long; with the usual spinning, 4 times as long while other work is running
ALWAYS = {"GOMP_SPINCOUNT": "3000", "TOKENIZERS_PARALLELISM": "false"}
#: turns off progress bars and messages of libraries; ours are shown instead
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # compressed-tensors ignores the setting of transformers
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns, with a stack, when another process has died
}
_LIBRARIES = r"(torch|transformers|huggingface_hub|datasets|compressed_tensors|sklearn)(\.|$)"


def is_debugging(environ: MutableMapping[str, str]) -> bool:
    """Return whether CPTQ_DEBUG requests tracebacks and the messages of libraries."""
    return environ.get("CPTQ_DEBUG", "") not in ("", "0")


def get_rank(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return the index of this process among those that a launcher started, and their number."""
    count = int(environ.get("WORLD_SIZE", "1"))
    return (int(environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set the defaults in `environ`; call this before anything imports torch."""
    quiet = {} if is_debugging(environ) else QUIET
    for name, value in {**ALWAYS, **quiet}.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in environ:  # it takes precedence
            environ.setdefault(name, value)


def let_libraries_speak(environ: MutableMapping[str, str]) -> None:
    """Undo the defaults that silence messages, not progress bars; before torch is imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        if environ.get(name) == QUIET[name]:
            environ[name] = "info"


def hide_foreign_bars() -> None:
    """Turn off every tqdm bar of this process, also those that ask to be shown.

    compressed-tensors shows one whatever the environment says.
    """
    if find_spec("tqdm") is None:
        return
    kind = import_module("tqdm.std").tqdm
    create = kind.__init__

    @wraps(create)
    def create_hidden(bar: Any, *given: Any, **options: Any) -> None:
        create(bar, *given, **{**options, "disable": True})

    if not hasattr(create, "__wrapped__"):
        kind.__init__ = create_hidden


def silence_libraries() -> None:
    """Ignore Python warnings raised inside libraries; ours are shown."""
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def replace_unencodable() -> None:
    """Print `?` for a character that the terminal cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
