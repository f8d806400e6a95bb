"""The whole way: each command as one function from settings to an outcome."""

from __future__ import annotations

from cptq.pipeline.commands import analyze, compress, evaluate

__all__ = ["analyze", "compress", "evaluate"]
