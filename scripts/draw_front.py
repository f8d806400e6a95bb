#!/usr/bin/env python3
"""Draw docs/images/front.svg, the size-quality front of the README.

The points are the figures of docs/benchmarks.md (SmolLM2-135M with dithered weights, perplexity of
WikiText-2 on 10 windows of 2,048 tokens), which stand there with the commands that measured them.
`cptq compare` draws the same picture of any models that it measures.

    python scripts/draw_front.py
"""

from __future__ import annotations

from pathlib import Path

from cptq.report.comparison import ComparedModel, ModelComparison
from cptq.report.render import render_comparison_files
from cptq.types import EvalResult

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "front.svg"
PARAMETERS = 134_515_008
#: name, bytes of the weight files, perplexity
FIGURES = (
    ("dense", 269_060_280, 26.94),
    ("4bit", 113_161_344, 29.32),
    ("4bit uniform", 113_175_144, 30.79),
    ("packed 105 MB", 105_442_576, 27.67),
    ("3bit", 99_903_528, 39.21),
    ("3bit uniform", 99_903_536, 44.29),
    ("packed 92 MB", 91_726_208, 28.20),
)


def make_model(name: str, nbytes: int, perplexity: float) -> ComparedModel:
    """Return a point of the picture."""
    result = EvalResult(
        task="wikitext",
        version=1,
        metric="perplexity",
        value=perplexity,
        unit="per token",
        higher_is_better=False,
        samples=10,
        seconds=0.0,
    )
    return ComparedModel(
        name=name,
        source=name,
        kind="causal-lm",
        parameters=PARAMETERS,
        weight_bytes=nbytes,
        effective_bits=None,
        results=(result,),
    )


def main() -> None:
    """Write the SVG."""
    models = tuple(make_model(*figure) for figure in FIGURES)
    comparison = ModelComparison(command_line="", models=models, quality=("wikitext", "perplexity"))
    files = render_comparison_files(comparison)
    (name,) = (name for name in files if name.endswith(".svg"))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(files[name])
    print(OUT)


if __name__ == "__main__":
    main()
