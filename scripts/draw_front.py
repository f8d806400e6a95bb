#!/usr/bin/env python3
"""Draw the size-quality front of the README from figures that were measured before.

    python scripts/draw_front.py

reads docs/images/front.csv (name, bytes, perplexity; the figures of docs/benchmarks.md) and writes
docs/images/front.svg. `cptq compare ... -o DIR` draws the same picture for models that it measures;
this script serves for files that cptq cannot load, such as those of other tools.
"""

from __future__ import annotations

import csv
from pathlib import Path

from cptq.report.comparison import ComparedModel, ModelComparison
from cptq.report.render import COMPARISON_FILES, render_comparison_files
from cptq.types import EvalResult

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TASK, METRIC = "wikitext", "perplexity"


def build_model(name: str, nbytes: int, perplexity: float) -> ComparedModel:
    """Return a model with one result."""
    result = EvalResult(
        task=TASK,
        version=1,
        metric=METRIC,
        value=perplexity,
        unit="per token",
        higher_is_better=False,
        samples=1,
        seconds=0.0,
    )
    return ComparedModel(
        name=name,
        source=name,
        kind="causal-lm",
        parameters=0,
        weight_bytes=nbytes,
        effective_bits=None,
        results=(result,),
    )


def main() -> None:
    with (IMAGES / "front.csv").open(encoding="utf-8", newline="") as lines:
        models = tuple(
            build_model(row["name"], int(row["bytes"]), float(row["perplexity"]))
            for row in csv.DictReader(lines)
        )
    comparison = ModelComparison(command_line="", models=models, quality=(TASK, METRIC))
    svg = render_comparison_files(comparison)[COMPARISON_FILES["svg"]]
    (IMAGES / "front.svg").write_bytes(svg)


if __name__ == "__main__":
    main()
