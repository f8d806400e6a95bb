"""The report as one HTML page: no script, no fetch, every text escaped by Jinja2."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cptq.report import words
from cptq.report.names import short_tasks
from cptq.report.plots import Figure, figures
from cptq.report.scatter import scatter_figure
from cptq.report.summary import Summary
from cptq.report.tables import all_tables, verification_words
from cptq.report.tally import notices_by_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline: what it is, the number, a word beside it; `tone` is "", "good" or "bad"."""

    label: str
    value: str
    more: str = ""
    tone: str = ""


def tiles(summary: Summary) -> list[Tile]:
    """The few numbers that a reader came for."""
    found = [
        Tile(
            label="parameters",
            value=words.count(summary.model.parameters),
            more=summary.model.family,
        )
    ]
    if summary.size is not None:
        found += _size_tiles(summary)
    tasks = short_tasks(row.task for row in summary.evaluation)
    for row in summary.comparison.rows[:3]:
        base = f"baseline {words.number(row.baseline.value)}" if row.baseline else row.result.unit
        label = f"{tasks[row.result.task]} {row.result.metric}"
        found.append(Tile(label=label, value=words.number(row.result.value), more=base))
    if summary.verification is not None:
        found.append(_verification_tile(summary))
    found.append(_notice_tile(summary))
    return found


def _size_tiles(summary: Summary) -> list[Tile]:
    size = summary.size
    if size is None:
        return []
    dense = f"of {words.size(size.dense_file_bytes)} dense"
    more = f"nominal {size.nominal_bits:.2f}, whole file {size.file_bits:.2f}"
    return [
        Tile(label="weight file", value=words.size(size.file_bytes), more=dense),
        Tile(label="effective bits", value=f"{size.effective_bits:.2f}", more=more),
    ]


def _verification_tile(summary: Summary) -> Tile:
    facts = summary.verification
    good = facts is not None and facts.clean
    difference = facts.max_abs_difference if facts else None
    return Tile(
        label="loads in transformers",
        value="yes" if good else "no",
        more=f"largest difference {words.number(difference, 3)}",
        tone="good" if good else "bad",
    )


def _notice_tile(summary: Summary) -> Tile:
    kinds = notices_by_kind(summary.notices)
    more = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
    return Tile(
        label="notices", value=str(len(summary.notices)), more=more or "nothing was skipped"
    )


def environment() -> Environment:
    """The templates; every text is escaped, a name that is missing is an error."""
    return Environment(
        loader=PackageLoader("cptq.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_html(summary: Summary) -> str:
    """The whole report.html."""
    templates = environment()
    style = templates.get_template("report.css").render()
    facts = summary.verification
    return templates.get_template("report.html.j2").render(
        summary=summary,
        tiles=tiles(summary),
        figures=[(figure, _drawing(figure)) for figure in _figures(summary)],
        tables=all_tables(summary),
        verification=verification_words(facts) if facts else "",
        style=Markup(style),  # our own file, no data in it
    )


def _figures(summary: Summary) -> list[Figure]:
    """The proof first, then the drawings over the layers."""
    proof = scatter_figure(summary.validation)
    return [*([proof] if proof else []), *figures(summary)]


def _drawing(figure: Figure) -> Markup:
    """Every text inside was escaped when the drawing was made (`svg.text`)."""
    return Markup(figure.svg)
