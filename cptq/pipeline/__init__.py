"""The whole way: each command as one function from settings to an outcome."""

from __future__ import annotations

from cptq.pipeline.analyze import analyze
from cptq.pipeline.bench import bench
from cptq.pipeline.compare import compare
from cptq.pipeline.compress import compress, plan
from cptq.pipeline.estimate import estimate
from cptq.pipeline.evaluate import evaluate
from cptq.pipeline.export import export
from cptq.pipeline.generate import generate
from cptq.pipeline.plan_targets import plan_targets
from cptq.pipeline.soup import soup

__all__ = [
    "analyze",
    "bench",
    "compare",
    "compress",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "plan",
    "plan_targets",
    "soup",
]
