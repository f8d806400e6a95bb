"""cptq: analyze, compress and evaluate Hugging Face models.

The functions below are the commands of the command line, see `cptq.api`. Importing cptq lets
transformers load packed artifacts (`cptq.inference.registration`); it imports neither torch nor
transformers itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cptq.inference.registration import ensure_registered

if TYPE_CHECKING:
    from cptq.api import (
        analyze,
        bench,
        compare,
        compress,
        estimate,
        evaluate,
        export,
        generate,
        inspect,
        plan,
        plan_targets,
        verify,
    )
    from cptq.checkpoint.loader import load

__all__ = [
    "__version__",
    "analyze",
    "bench",
    "compare",
    "compress",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "plan_targets",
    "soup",
    "verify",
]
__version__ = "0.1.0"

ensure_registered()


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cptq.checkpoint.loader" if name == "load" else "cptq.api"), name)
