"""Hooks of mkdocs (mkdocs.yml): the documents outside of docs/ become pages of the site.

README.md is the first page. Links between the documents lead from page to page; links to other
files of the repository, which the site does not hold, become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: {file of the repository: page of the site}; those of docs/ keep their names
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Let links lead to pages of the site."""
    sources = {name: source for source, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        place, hash_sign, anchor = target.partition("#")
        if not place or "://" in place:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), place))
        name = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return text if (ROOT / path).exists() else match[0]  # mkdocs names what is lost
        return f"{mark}[{text}]({name}{hash_sign}{anchor})"

    return LINK.sub(rewrite, markdown)
