"""Reports: the `Summary` of a run or a `ModelComparison`, rendered as JSON, Markdown and HTML."""

from cptq.report.summary import (
    AnalyzeOutcome,
    CompressOutcome,
    EvalOutcome,
    ModelFacts,
    Summary,
    VerificationFacts,
)

__all__ = [
    "AnalyzeOutcome",
    "CompressOutcome",
    "EvalOutcome",
    "ModelFacts",
    "Summary",
    "VerificationFacts",
]
