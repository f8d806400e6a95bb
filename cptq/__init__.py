"""cptq: analyze, compress and evaluate Hugging Face models.

Importing it lets transformers load packed artifacts (`cptq.inference.registration`); it imports
neither torch nor transformers itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cptq.inference.registration import ensure_registered

if TYPE_CHECKING:
    from cptq.checkpoint.loader import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

ensure_registered()


def __getattr__(name: str) -> Any:
    """`load` when it is first asked for: it needs torch."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("cptq.checkpoint.loader").load
