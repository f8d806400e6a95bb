"""What must be in the environment before torch and transformers are imported.

Only defaults are set: what the user has set stays.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping

#: idle OpenMP threads spin for some microseconds, then sleep: sleeping at once takes up to 7 times
#: as long with small tensors, spinning as long as is usual 4 times where other work wants the cores
ALWAYS = {"GOMP_SPINCOUNT": "3000", "TOKENIZERS_PARALLELISM": "false"}
#: progress bars and chatter of libraries; ours are shown instead
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # compressed-tensors shows its bars whatever transformers is told
}
_CHATTY = r"(torch|transformers|huggingface_hub|datasets|compressed_tensors|sklearn)(\.|$)"


def debugging(environ: MutableMapping[str, str]) -> bool:
    """CPTQ_DEBUG asks for tracebacks and for what libraries have to say."""
    return environ.get("CPTQ_DEBUG", "") not in ("", "0")


def prepare(environ: MutableMapping[str, str]) -> None:
    """Set the defaults in `environ`; call this before anything imports torch."""
    quiet = {} if debugging(environ) else QUIET
    for name, value in {**ALWAYS, **quiet}.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in environ:  # it would overrule that
            environ.setdefault(name, value)


def hush() -> None:
    """Silence Python warnings raised inside libraries; ours are shown."""
    warnings.filterwarnings("ignore", module=_CHATTY)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def tolerate_encodings() -> None:
    """Let a terminal that cannot show a character show `?` instead of failing the run."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
