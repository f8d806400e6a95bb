"""Rendering a report: the same summary as JSON for programs, Markdown and HTML for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cptq.report.html import render_html
from cptq.report.markdown import render_markdown
from cptq.report.summary import Summary

FILES = {"json": "report.json", "md": "report.md", "html": "report.html"}

#: a list of nothing but numbers, spread over lines (no text holds a raw line end in JSON)
_NUMBERS = re.compile(r"\[\n\s+-?\d[\d.eE+\-]*(?:,\n\s+-?\d[\d.eE+\-]*)*\n\s*\]")


def json_text(data: Mapping[str, Any]) -> str:
    """Strict JSON, the fields in their own order, each list of numbers on a line of its own."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    return _NUMBERS.sub(lambda match: re.sub(r"\s", "", match[0]), text) + "\n"


def render_json(summary: Summary) -> str:
    """The whole report.json."""
    return json_text(summary.to_dict())


def render_reports(summary: Summary) -> dict[str, str]:
    """The text of each report by its kind: "json", "md", "html"."""
    return {
        "json": render_json(summary),
        "md": render_markdown(summary),
        "html": render_html(summary),
    }


def report_files(summary: Summary) -> dict[str, bytes]:
    """{file name: content} of report.json, report.md and report.html."""
    texts = render_reports(summary)
    return {FILES[kind]: text.encode("utf-8", errors="replace") for kind, text in texts.items()}
