"""Documents for rolling likelihoods, in the form lm-evaluation-harness has them.

Its task `wikitext` takes WikiText-2 raw by article: a page begins at a heading of the first level
(` = Title = `), lines keep their spaces and are joined by newlines. Before a page is scored the
corpus's spacing is taken out by the rules of `detokenize`; words and bytes are counted in the page
as it was. Its task `c4` does the same with the documents of C4's first validation file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cptq.data.corpora import c4_rows
from cptq.data.files import WAYS, MissingDataError, data_directory, first_existing, looked_in
from cptq.data.hub import hub_rows
from cptq.errors import DataError
from cptq.types import digest

PAGES_REPOSITORY, PAGES_CONFIG = "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"
_FILES = ("wikitext-2-raw/wiki.test.raw",)

#: in this order (the harness has one rule more, which matches nothing: it is quoted as /.../)
_REPLACEMENTS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_BRACKETS = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Documents as they are counted; what is scored is `detokenize` of each."""

    documents: tuple[str, ...]
    origin: str

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the documents."""
        return digest(list(self.documents))


def detokenize(page: str) -> str:
    """A page of WikiText without the spaces around its punctuation, as the harness has it."""
    for old, new in _REPLACEMENTS:
        page = page.replace(old, new)
    for pattern, new in _BRACKETS:
        page = pattern.sub(new, page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def split_pages(raw: str) -> tuple[str, ...]:
    """The articles of an original WikiText file, each from its heading on."""
    pages, lines = [], list[str]()
    for line in raw.split("\n"):
        if _is_title(line):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    whole = [page for page in pages if page.strip()]
    return (*whole, "\n".join(lines))


def _is_title(line: str) -> bool:
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")


def load_pages(
    name: str, *, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> Pages:
    """The documents of the task `wikitext-rolling` or `c4-rolling`.

    Raises:
        MissingDataError: neither local nor to be had from the Hub; says where was looked.
        DataError: not UTF-8, or empty.
    """
    if name == "c4-rolling":
        texts, origin = c4_rows(data_dir=data_dir, cache_dir=cache_dir, token=token)
        return Pages(documents=texts, origin=origin)
    root = data_directory(data_dir)
    path = first_existing(root, _FILES)
    if path is not None:
        return Pages(documents=split_pages(_raw(path)), origin=str(path))
    try:
        rows = hub_rows(PAGES_REPOSITORY, PAGES_CONFIG, "test", cache_dir=cache_dir, token=token)
    except MissingDataError as error:
        looked = looked_in(root, _FILES)
        raise MissingDataError(f"no WikiText-2 pages: {looked}; {error.problem}", hint=WAYS) from (
            error
        )
    return Pages(
        documents=tuple(str(row["page"]) for row in rows), origin=f"{PAGES_REPOSITORY} test (Hub)"
    )


def _raw(path: Path) -> str:
    """The text with its white space as it is: it is counted."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: offset {error.start}") from error
    if not text.strip():
        raise DataError(f"{path} is empty", hint="give a file with text in it")
    return text
