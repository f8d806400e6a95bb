"""Render what became of the families as docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from tests.family_walk import Row

_ORDER = ("works", "works in cptq", "refused", "late", "wrong", "error", "not built")
_HEAD = """# Families of models

Every text family that transformers {version} builds from a config, with random weights of a few
thousand: as a causal LM, classifier, masked LM or encoder. `scripts/check_families ROWS.jsonl`
walks them and writes this file. Models of images or sound are left out: their language models have
rows of their own.

{counts}

- **works**: with the default runtime, stock transformers, each of these steps: load; the replay
  block by block equals a plain forward pass, with and without padding; analyze by the default
  metric, CCA, pruning and Taylor; compress to 4 bits by nearest rounding and by GPTQ; verify; eval
  of causal LMs, whose perplexity equals the one computed by hand; and, except in classifiers,
  GPTQ's output is no worse than that of nearest rounding, or the run says so. *whole*: its blocks
  are not a chain, so that the part around them is run as a whole, which takes more time and memory.
  *kept dense* counts the linears that stay as they are, and says why.
- **works in cptq**: the same with `--runtime cptq`; the default runtime refuses it at the door,
  with the sentence given.
- **refused**: at the door, by the step given, with the sentence given.
- **late**: refused after work was begun, with the sentence given.
- **wrong**, **error**: a number differs from the one by hand; an exception escaped.
- **not built**: transformers itself does not build or run the small config.

The reload check runs in the walk's own process here; `cptq compress` starts a fresh one.
"""


def render_table(rows: Sequence[Row]) -> str:
    """Return the document."""
    groups: dict[str, list[Row]] = {verdict: [] for verdict in _ORDER}
    for row in sorted(rows, key=lambda row: row.family):
        groups[_judge(row)].append(row)
    counts = ", ".join(f"{len(group)} {name}" for name, group in groups.items() if group)
    some = sum(bool(row.dense) for row in rows if row.verdict == "works")
    counts = f"{len(rows)} families: {counts}.\nOf those that work {some} keep linears dense."
    parts = [_HEAD.format(version=transformers.__version__, counts=counts)]
    for verdict, group in groups.items():
        if group:
            lines = _render_working(group) if verdict == "works" else _render_others(group)
            parts += [f"## {verdict.capitalize()}", "", *lines, ""]
    return "\n".join(parts)


def _judge(row: Row) -> str:
    return "works in cptq" if row.verdict == "works" and row.runtime else row.verdict


def _render_working(rows: Sequence[Row]) -> list[str]:
    lines = ["| family | as | way | linears compressed | kept dense |", "|---|---|---|---:|---|"]
    for row in rows:
        dense = "; ".join(f"{count}: {_clean(reason)}" for reason, count in row.dense.items())
        lines.append(
            f"| {row.family} | {row.kind} | {_name_way(row)} | {row.compressed} | {dense} |"
        )
    return lines


def _render_others(rows: Sequence[Row]) -> list[str]:
    lines = ["| family | as | way | step | sentence |", "|---|---|---|---|---|"]
    for row in rows:
        step = "compress" if row.verdict == "works" else row.step
        lines.append(
            f"| {row.family} | {row.kind} | {_name_way(row)} | {step} | {_clean(row.text)} |"
        )
    return lines


def _name_way(row: Row) -> str:
    return "whole" if any("not a chain" in note for note in row.notices) else ""


def _clean(text: str) -> str:
    """Return a text for a cell, without the folder of the walk."""
    words = [
        "MODEL" if word.startswith("/") and word.endswith("model") else word
        for word in text.split()
    ]
    return " ".join(words).replace("|", "\\|").removesuffix("; kept dense")
