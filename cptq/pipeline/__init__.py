"""The whole way: each command as one function from settings to an outcome.

The functions are imported when they are first used, as all but the checks before a run
(`cptq.pipeline.preflight`) need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cptq.pipeline.analyze import analyze
    from cptq.pipeline.compare import compare
    from cptq.pipeline.compress import compress, plan
    from cptq.pipeline.evaluate import evaluate
    from cptq.pipeline.export import export

__all__ = ["analyze", "compare", "compress", "evaluate", "export", "plan"]


def __getattr__(name: str) -> Any:
    """Return a function of a command."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "compress" if name == "plan" else name
    return getattr(import_module(f"{__name__}.{home}"), name)
