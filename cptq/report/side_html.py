"""Models side by side as files: JSON, one HTML page, the front as SVG."""

from __future__ import annotations

from markupsafe import Markup

from cptq.report.front import front_figure, standalone
from cptq.report.html import environment
from cptq.report.render import json_text
from cptq.report.side_by_side import SideBySide
from cptq.report.side_tables import side_tables

FILES = {"json": "compare.json", "html": "compare.html", "svg": "front.svg"}


def side_files(found: SideBySide) -> dict[str, bytes]:
    """{file name: content}; no front.svg where there is no front to draw."""
    figure, templates = front_figure(found), environment()
    style = templates.get_template("report.css").render()
    page = templates.get_template("compare.html.j2").render(
        found=found,
        figure=figure,
        drawing=Markup(figure.svg) if figure else "",  # its texts were escaped by `svg.text`
        tables=side_tables(found),
        style=Markup(style),  # our own file, no data in it
    )
    texts = {"json": json_text(found.to_dict()), "html": page}
    if figure is not None:
        texts["svg"] = standalone(figure, style)
    return {FILES[kind]: text.encode("utf-8", errors="replace") for kind, text in texts.items()}
