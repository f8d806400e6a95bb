"""One summary of a run (`summary`) and its renderings (`render`): JSON, Markdown, HTML."""

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
