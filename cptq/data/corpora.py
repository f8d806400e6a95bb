"""Corpora to evaluate on beside WikiText-2: WikiText-103, Penn Treebank and C4; and documents.

The corpora are as the GPTQ repository feeds them to a model (there `ptb-new` and `c4-new`):

- WikiText-103's test part, rows joined as WikiText-2's are. It is the same text as WikiText-2's
  test part; the original `.tokens` file has rare words as <unk>, and a note says so.
- Penn Treebank's test part: its lines, stripped, joined by a space.
- C4: the first 1,100 documents of the first English validation file, joined by a space; the first
  256 windows of the text are measured.

Documents (`load_pages`) are for rolling likelihoods, in the form lm-evaluation-harness has them.
Its task `wikitext` takes WikiText-2 raw by article: a page begins at a heading of the first level
(` = Title = `), lines keep their spaces and are joined by newlines. Before a page is scored the
corpus's spacing is removed by the rules of `detokenize`; words and bytes are counted in the page as
it was. Its task `c4` does the same with the documents of C4's first validation file.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cptq.data.files import (
    explain_missing,
    find_data_directory,
    find_first,
    read_text,
)
from cptq.data.hub import load_hub_rows
from cptq.data.text import Text
from cptq.data.wikitext import REPOSITORY as WIKITEXT
from cptq.data.wikitext import SEPARATOR, is_title, split_rows
from cptq.errors import DataError
from cptq.types import digest

C4_FILE = "c4-validation.00000-of-00008.json"
C4_DOCUMENTS, C4_WINDOWS = 1100, 256
_FILES = {
    "wikitext103": (
        "wikitext-103-raw/wiki.test.raw",
        "wikitext-103/wiki.test.raw",
        "wikitext-103/wiki.test.tokens",
    ),
    "ptb": ("ptb/ptb.test.txt", "simple-examples/data/ptb.test.txt"),
    "c4": tuple(f"{folder}/{C4_FILE}{end}" for folder in ("c4/en", "c4") for end in (".gz", "")),
}
CORPORA = tuple(_FILES)
PAGES_REPOSITORY, PAGES_CONFIG = "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"
_PAGES_FILES = ("wikitext-2-raw/wiki.test.raw",)

#: in this order (the harness has one more rule, which matches nothing: it is quoted as /.../)
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


def load_corpus(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> Text:
    """Load the evaluation text of wikitext103, ptb or c4.

    Raises:
        MissingDataError: neither local nor on the Hub.
        DataError: empty, not UTF-8, or a line of C4 that is not JSON with a text.
    """
    separator, notes = (SEPARATOR if name == "wikitext103" else " "), tuple[str, ...]()
    if name == "c4":
        texts, origin = load_c4(data_dir=data_dir, cache_dir=cache_dir, token=token)
        documents = texts[:C4_DOCUMENTS]
    else:
        documents, origin = _load_lines(name, data_dir, cache_dir, token)
    if origin.endswith(".tokens"):
        notes = ("the .tokens file of WikiText-103 has rare words as <unk>",)
    return Text(
        source=name,
        split="evaluation",
        documents=documents,
        separator=separator,
        origin=origin,
        notes=notes,
    )


def _load_lines(
    name: str, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> tuple[tuple[str, ...], str]:
    root = find_data_directory(data_dir)
    path = find_first(root, _FILES[name])
    if path is not None:
        text = read_text(path)
        stripped = tuple(line.strip() for line in text.removesuffix("\n").split("\n"))
        return (stripped if name == "ptb" else split_rows(text)), str(path)
    repository, config, column, revision = {
        "wikitext103": (WIKITEXT, "wikitext-103-raw-v1", "text", None),
        # the repository itself holds a script, which `datasets` no longer runs
        "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "refs/convert/parquet"),
    }[name]
    with explain_missing(f"{name} text", root, _FILES[name][:1]):
        found = load_hub_rows(
            repository, config, "test", cache_dir=cache_dir, token=token, revision=revision
        )
    return tuple(str(row[column]) for row in found), f"{repository} {config} test (Hub)"


def load_c4(
    *, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> tuple[tuple[str, ...], str]:
    """Load (documents, origin) of the first English validation file of C4.

    Raises:
        MissingDataError, DataError: as `load_corpus`.
    """
    root = find_data_directory(data_dir)
    path = find_first(root, _FILES["c4"])
    if path is not None:
        return _read_json_texts(path), str(path)
    with explain_missing("c4 text", root, _FILES["c4"][:1]):
        found = load_hub_rows(
            "allenai/c4",
            "en",
            "validation",
            cache_dir=cache_dir,
            token=token,
            data_files={"validation": f"en/{C4_FILE}.gz"},
        )
    return tuple(str(row["text"]) for row in found), f"allenai/c4 en/{C4_FILE} (Hub)"


def _read_json_texts(path: Path) -> tuple[str, ...]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            texts = tuple(str(json.loads(line)["text"]) for line in lines if line.strip())
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a JSON lines file with the key text: {error}") from error
    if not any(text.strip() for text in texts):
        raise DataError(f"{path} is empty", hint="give the original file")
    return texts


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
    """Remove the spaces around the punctuation of a page of WikiText, as the harness does."""
    for old, new in _REPLACEMENTS:
        page = page.replace(old, new)
    for pattern, new in _BRACKETS:
        page = pattern.sub(new, page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def split_pages(raw: str) -> tuple[str, ...]:
    """Split an original WikiText file into articles, each from its heading on."""
    pages, lines = [], list[str]()
    for line in raw.split("\n"):
        if is_title(line):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    whole = [page for page in pages if page.strip()]
    return (*whole, "\n".join(lines))


def load_pages(
    name: str, *, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> Pages:
    """Load the documents of the task `wikitext-rolling` or `c4-rolling`.

    Raises:
        MissingDataError: neither local nor on the Hub.
        DataError: not UTF-8, or empty.
    """
    if name == "c4-rolling":
        texts, origin = load_c4(data_dir=data_dir, cache_dir=cache_dir, token=token)
        return Pages(documents=texts, origin=origin)
    root = find_data_directory(data_dir)
    path = find_first(root, _PAGES_FILES)
    if path is not None:
        return Pages(documents=split_pages(_read_raw(path)), origin=str(path))
    with explain_missing("WikiText-2 pages", root, _PAGES_FILES):
        rows = load_hub_rows(
            PAGES_REPOSITORY, PAGES_CONFIG, "test", cache_dir=cache_dir, token=token
        )
    return Pages(
        documents=tuple(str(row["page"]) for row in rows), origin=f"{PAGES_REPOSITORY} test (Hub)"
    )


def _read_raw(path: Path) -> str:
    """Read the text with its white space as it is, since it is counted."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: offset {error.start}") from error
    if not text.strip():
        raise DataError(f"{path} is empty", hint="give a file with text in it")
    return text
