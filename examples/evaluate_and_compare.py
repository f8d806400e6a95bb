"""Measure what compression cost, on the same samples for the model and the artifact.

    python examples/evaluate_and_compare.py [MODEL] [ARTIFACT]

ARTIFACT is a directory that `cptq.compress` wrote, such as that of examples/compress_a_model.py.
The text is the English of Python's own manual, which needs no download; for a result to publish
use `tasks=["wikitext"]` and no `limit`.
"""

import sys

import cptq

MODEL, ARTIFACT = (
    *sys.argv[1:],
    *("HuggingFaceTB/SmolLM2-135M", "example-4bit")[len(sys.argv) - 1 :],
)
TASK = {"tasks": ["pydoc"], "limit": 4, "seqlen": 128}

outcome = cptq.evaluate(ARTIFACT, baseline=MODEL, **TASK)
for row in outcome.summary.comparison.rows:
    beside = f" (baseline {row.baseline.value:.4f}, {row.verdict})" if row.baseline else ""
    print(f"{row.result.metric}: {row.result.value:.4f} {row.result.unit}{beside}")

comparison = cptq.compare(MODEL, ARTIFACT, no_footprint=True, **TASK).comparison
for model in comparison.models:
    place = "on the size-quality front" if comparison.is_on_front(model) else "dominated"
    print(f"{model.name}: {model.weight_bytes:,} bytes, {place}")
