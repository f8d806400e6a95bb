"""One summary of a run and its renderings: JSON, Markdown and a self-contained HTML page."""

from cptq.report.render import render_reports, write_reports
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
    "render_reports",
    "write_reports",
]
