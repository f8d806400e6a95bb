"""The report as Markdown: the same tables, every cell escaped, none folded but the long ones."""

from __future__ import annotations

import re

from cptq.report.summary import Summary
from cptq.report.table import Table
from cptq.report.tables import all_tables, verification_words

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def cell(value: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(value.split()))


def code(value: str) -> str:
    """A span of code, fenced by more backticks than the text holds in a row."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if value.startswith("`") or value.endswith("`") else ""
    return f"{fence}{pad}{' '.join(value.split())}{pad}{fence}"


def table_text(table: Table) -> str:
    """A table under its heading; a folded one inside a `<details>`."""
    rules = ["--:" if name in table.right else "---" for name in table.columns]
    lines = [_row(tuple(map(cell, table.columns))), _row(tuple(rules))]
    lines += [_row(tuple(map(cell, row))) for row in table.rows]
    note = f"\n\n{cell(table.note)}" if table.note else ""
    grid = "\n".join(lines) + note
    if table.folded:
        return f"<details><summary>{cell(table.title)}</summary>\n\n{grid}\n\n</details>"
    return f"## {cell(table.title)}\n\n{grid}"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def render_markdown(summary: Summary) -> str:
    """The whole report.md."""
    head = [f"# cptq {summary.command}: {cell(summary.model.source)}", code(summary.command_line)]
    if summary.created:
        head.append(cell(summary.created))
    if summary.verification:
        head.append(f"Verified by loading: {cell(verification_words(summary.verification))}.")
    return "\n\n".join([*head, *map(table_text, all_tables(summary))]) + "\n"
