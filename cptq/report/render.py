"""Writing a report: the same summary as JSON for programs, Markdown and HTML for people."""

from __future__ import annotations

import json
from pathlib import Path

from cptq.report.html import render_html
from cptq.report.markdown import render_markdown
from cptq.report.summary import Summary

FILES = {"json": "report.json", "md": "report.md", "html": "report.html"}


def render_json(summary: Summary) -> str:
    """The whole report.json: strict JSON, the fields in their own order."""
    return json.dumps(summary.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_reports(summary: Summary) -> dict[str, str]:
    """The text of each report by its kind: "json", "md", "html"."""
    return {
        "json": render_json(summary),
        "md": render_markdown(summary),
        "html": render_html(summary),
    }


def write_reports(summary: Summary, directory: Path) -> dict[str, Path]:
    """Write report.json, report.md and report.html into `directory`, which is made if absent.

    Returns:
        kind -> path.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {kind: directory / name for kind, name in FILES.items()}
    for kind, content in render_reports(summary).items():
        paths[kind].write_bytes(content.encode("utf-8", errors="replace"))
    return paths
