"""Render reports: the same values as JSON for programs, Markdown and HTML for people.

The HTML page is one file without scripts or external resources; Jinja2 escapes every text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cptq.report.before_after import tell
from cptq.report.comparison import ModelComparison, build_comparison_tables
from cptq.report.depth import draw_depth
from cptq.report.derived import build_json
from cptq.report.formatting import (
    Table,
    format_bytes,
    format_count,
    format_number,
    shorten_tasks,
)
from cptq.report.front import draw_front, make_standalone
from cptq.report.layer_map import draw_map
from cptq.report.parts import draw_parts
from cptq.report.plan_front import draw_plan_front, draw_run_front
from cptq.report.plans import PlansOutcome
from cptq.report.plots import draw_figures
from cptq.report.sensitivity_axis import draw_sensitivity_axis
from cptq.report.sparsity import draw_sparsity
from cptq.report.summary import Summary, group_notices
from cptq.report.svg import Figure
from cptq.report.tables import build_tables, describe_verification
from cptq.report.validation import draw_scatter

FILES = {"json": "report.json", "md": "report.md", "html": "report.html"}
COMPARISON_FILES = {"json": "compare.json", "html": "compare.html", "svg": "front.svg"}

#: a list of numbers only, spread over lines (no JSON text contains a raw line end)
_NUMBERS = re.compile(r"\[\n\s+-?\d[\d.eE+\-]*(?:,\n\s+-?\d[\d.eE+\-]*)*\n\s*\]")
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def render_files(summary: Summary) -> dict[str, bytes]:
    """Return {file name: content} of report.json, report.md and report.html."""
    texts = render_reports(summary)
    return {FILES[kind]: _encode(text) for kind, text in texts.items()}


def render_reports(summary: Summary) -> dict[str, str]:
    """Return the text of each report by kind: "json", "md", "html"."""
    return {
        "json": render_json(summary),
        "md": render_markdown(summary),
        "html": render_html(summary),
    }


def render_comparison_files(comparison: ModelComparison) -> dict[str, bytes]:
    """Return {file name: content} of a comparison; front.svg only if a front can be drawn."""
    figure, templates = draw_front(comparison), load_templates()
    style = templates.get_template("report.css").render()
    page = templates.get_template("compare.html.j2").render(
        comparison=comparison,
        figure=figure,
        drawing=_mark_safe(figure) if figure else "",
        tables=build_comparison_tables(comparison),
        style=Markup(style),  # our own file without data
    )
    texts = {"json": format_json(comparison.to_dict()), "html": page}
    if figure is not None:
        texts["svg"] = make_standalone(figure, style)
    return {COMPARISON_FILES[kind]: _encode(text) for kind, text in texts.items()}


def render_plan_files(outcome: PlansOutcome) -> dict[str, bytes]:
    """Return {file name: content} of plans.json, and of front.svg where a front can be drawn."""
    files = {"plans.json": _encode(format_json(outcome.to_dict()))}
    figure = draw_plan_front(outcome.view)
    if figure is not None:
        style = load_templates().get_template("report.css").render()
        files["front.svg"] = _encode(make_standalone(figure, style))
    return files


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def render_json(summary: Summary) -> str:
    """Render report.json."""
    return format_json(build_json(summary))


def format_json(data: Mapping[str, Any]) -> str:
    """Format data as strict JSON in field order, each list of numbers on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    return _NUMBERS.sub(lambda match: re.sub(r"\s", "", match[0]), text) + "\n"


def render_markdown(summary: Summary) -> str:
    """Render report.md: the same tables as report.html."""
    title = f"# cptq {summary.command}: {escape_cell(summary.model.source)}"
    head = [title, *map(escape_cell, tell(summary))]
    if summary.created:
        head.append(escape_cell(summary.created))
    if summary.verification:
        head.append(f"Reload check: {escape_cell(describe_verification(summary.verification))}.")
    repeat = f"## Repeat it\n\n{quote_code(summary.command_line)}"
    return "\n\n".join([*head, *map(render_table, build_tables(summary)), repeat]) + "\n"


def render_table(table: Table) -> str:
    """Render a table as Markdown under its heading; a folded one inside a `<details>`."""
    rules = ["--:" if name in table.right else "---" for name in table.columns]
    lines = [_join_cells(tuple(map(escape_cell, table.columns))), _join_cells(tuple(rules))]
    lines += [_join_cells(tuple(map(escape_cell, row))) for row in table.rows]
    note = f"\n\n{escape_cell(table.note)}" if table.note else ""
    grid = "\n".join(lines) + note
    if table.folded:
        return f"<details><summary>{escape_cell(table.title)}</summary>\n\n{grid}\n\n</details>"
    return f"## {escape_cell(table.title)}\n\n{grid}"


def _join_cells(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape_cell(value: str) -> str:
    """Escape text so that Markdown shows it literally, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(value.split()))


def quote_code(value: str) -> str:
    """Format text as a code span, fenced by more backticks than it contains in a row."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if value.startswith("`") or value.endswith("`") else ""
    return f"{fence}{pad}{' '.join(value.split())}{pad}{fence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline number with its label and a detail; `tone` is "", "good" or "bad"."""

    label: str
    value: str
    more: str = ""
    tone: str = ""


def render_html(summary: Summary) -> str:
    """Render report.html."""
    templates = load_templates()
    style = templates.get_template("report.css").render()
    facts = summary.verification
    return templates.get_template("report.html.j2").render(
        summary=summary,
        sentences=tell(summary),
        tiles=build_tiles(summary),
        figures=[(figure, _mark_safe(figure)) for figure in _draw_all_figures(summary)],
        tables=build_tables(summary),
        verification=describe_verification(facts) if facts else "",
        style=Markup(style),  # our own file without data
    )


def load_templates() -> Environment:
    """Load the templates; every text is escaped and a missing name is an error."""
    return Environment(
        loader=PackageLoader("cptq.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _draw_all_figures(summary: Summary) -> list[Figure]:
    """Draw the validation scatter plot first, then what the plan is, then the layers."""
    found = [
        draw_scatter(summary.validation),
        draw_parts(summary),
        draw_run_front(summary),
        draw_map(summary),
        draw_sensitivity_axis(summary),
        draw_depth(summary),
    ]
    drawn = [figure for figure in found if figure]
    return [*drawn, *draw_figures(summary), *draw_sparsity(summary)]


def _mark_safe(figure: Figure) -> Markup:
    """Mark a drawing as safe: its texts were escaped when it was drawn (`svg.escape_text`)."""
    return Markup(figure.svg)


def build_tiles(summary: Summary) -> list[Tile]:
    """Build the headline numbers at the top of the page."""
    model = summary.model
    tiles = [Tile(label="parameters", value=format_count(model.parameters), more=model.family)]
    tiles += _build_size_tiles(summary)
    tasks = shorten_tasks(row.task for row in summary.evaluation)
    for row in summary.comparison.rows[:3]:
        base = f"baseline {format_number(row.baseline.value)}" if row.baseline else row.result.unit
        label = f"{tasks[row.result.task]} {row.result.metric}"
        tiles.append(Tile(label=label, value=format_number(row.result.value), more=base))
    if summary.verification is not None:
        tiles.append(_build_verification_tile(summary))
    return [*tiles, _build_notice_tile(summary)]


def _build_size_tiles(summary: Summary) -> list[Tile]:
    size = summary.size
    if size is None:
        return []
    dense = f"of {format_bytes(size.dense_file_bytes)} dense"
    more = f"nominal {size.nominal_bits:.2f}, whole file {size.file_bits:.2f}"
    return [
        Tile(label=size.file, value=format_bytes(size.file_bytes), more=dense),
        Tile(label="effective bits", value=f"{size.effective_bits:.2f}", more=more),
    ]


def _build_verification_tile(summary: Summary) -> Tile:
    facts = summary.verification
    good = facts is not None and facts.clean
    difference = facts.max_abs_difference if facts else None
    return Tile(
        label="loads in transformers",
        value="yes" if good else "no",
        more=f"largest difference {format_number(difference, 3)}",
        tone="good" if good else "bad",
    )


def _build_notice_tile(summary: Summary) -> Tile:
    kinds = group_notices(summary.notices)
    more = ", ".join(f"{len(notices)} {kind}" for kind, notices in kinds.items())
    return Tile(label="notices", value=str(len(summary.notices)), more=more or "none")
