"""Render what became of the families as docs/families.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import transformers

from tests.family_walk import Row

_ORDER = ("works", "refused", "late", "wrong", "error", "not built")
_HEAD = """# Families of models

Every text family that transformers {version} builds from a config, with random weights of a few
thousand: as a causal LM, classifier, masked LM or encoder. Each is loaded, its replay block by
block compared with a plain forward pass, analyzed, compressed to 4 bits by nearest rounding and by
GPTQ, verified, evaluated (perplexity is computed by hand as well) and compared with the dense
model. `scripts/check_families ROWS.jsonl` writes this file. Models of images or sound are left out:
their language models have rows of their own.

- **works**: all steps that it was walked. *whole*: its blocks are not a chain, so that the part
  around them is run as a whole, which takes more time and memory. *cptq*: with `--runtime cptq`
  alone.
- **refused**: with the sentence given, by the step given.
- **not built**: transformers itself does not build or run the small config.

{counts}
"""


def render_table(rows: Sequence[Row]) -> str:
    """Return the document."""
    counts = Counter(row.verdict for row in rows)
    line = ", ".join(f"{counts[name]} {name}" for name in _ORDER if counts[name])
    head = _HEAD.format(version=transformers.__version__, counts=f"{len(rows)} families: {line}.")
    parts = [head]
    for verdict in _ORDER:
        group = sorted((row for row in rows if row.verdict == verdict), key=lambda row: row.family)
        if group:
            lines = _render_working(group) if verdict == "works" else _render_others(group)
            parts += [f"## {verdict.capitalize()}", "", *lines, ""]
    return "\n".join(parts)


def _render_working(rows: Sequence[Row]) -> list[str]:
    lines = ["| family | as | way | linears compressed | kept dense |", "|---|---|---|---:|---|"]
    for row in rows:
        way = ["whole"] if any("not a chain" in note for note in row.notices) else []
        way += ["cptq"] if row.runtime else []
        dense = "; ".join(f"{count}: {_clean(reason)}" for reason, count in row.dense.items())
        lines.append(
            f"| {row.family} | {row.kind} | {', '.join(way)} | {row.compressed} | {dense} |"
        )
    return lines


def _render_others(rows: Sequence[Row]) -> list[str]:
    lines = ["| family | as | step | sentence |", "|---|---|---|---|"]
    return lines + [f"| {r.family} | {r.kind} | {r.step} | {_clean(r.text)} |" for r in rows]


def _clean(text: str) -> str:
    """Return a text for a cell, without the folder of the walk."""
    words = [
        "MODEL" if word.startswith("/") and word.endswith("model") else word
        for word in text.split()
    ]
    return " ".join(words).replace("|", "\\|").removesuffix("; kept dense")
