"""WikiText-2 raw, in the form on which published perplexities were measured.

The GPTQ repository joins the Hub data set's `text` rows by two newlines. A row there is one line of
the original file with its newline kept, and a line of nothing but white space is the empty string.
So the rows "", " = Robert Boulter = \\n", "" give two newlines, the heading, and five newlines.
`split_rows` makes the same rows from `wiki.test.raw`. Tokenising the file as it is, or lines
without their newline, gives other tokens and another number: smollm2-135m has the
published-protocol perplexity 19.92 on its first 20,480 tokens (windows of 2,048, no BOS) with these
rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cptq.data.files import (
    explain_missing,
    find_data_directory,
    find_first,
    read_text,
)
from cptq.data.hub import load_hub_rows

REPOSITORY, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
SEPARATOR = "\n\n"
SUBSTITUTE = "wiki.valid.tokens"
_FILES = {
    "evaluation": ("wikitext-2-raw/wiki.test.raw",),
    "calibration": ("wikitext-2-raw/wiki.train.raw", f"wikitext-103/{SUBSTITUTE}"),
}
_HUB_SPLITS = {"evaluation": "test", "calibration": "train"}

Found = tuple[tuple[str, ...], str, tuple[str, ...]]


def split_rows(raw: str) -> tuple[str, ...]:
    """Split the text of an original file into the rows of the Hub's data set."""
    lines = raw.removesuffix("\n").split("\n")
    return tuple(f"{line}\n" if line.strip() else "" for line in lines)


def split_articles(rows: Iterable[str], separator: str = SEPARATOR) -> tuple[str, ...]:
    """Join rows to articles, each from its heading of the first level (` = Title = `) on."""
    articles: list[list[str]] = [[]]
    for row in rows:
        if is_title(row):
            articles.append([])
        articles[-1].append(row)
    return tuple(separator.join(article) for article in articles)


def is_title(line: str) -> bool:
    """Whether a line is the title of an article, and not the heading of a section."""
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")


def load_wikitext(
    split: str, *, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> Found:
    """Load (rows, origin, notes): evaluation is the test part, calibration never is.

    Calibration takes WikiText-2's training part, or WikiText-103's validation part if a data
    directory has only that; local files take precedence over the Hub, so that the network changes
    no number.

    Raises:
        MissingDataError: neither local nor on the Hub.
    """
    root = find_data_directory(data_dir)
    path = find_first(root, _FILES[split])
    if path is not None:
        return split_rows(read_text(path)), str(path), _describe_substitute(path)
    part = _HUB_SPLITS[split]
    with explain_missing(f"WikiText-2 {part} text", root, _FILES[split]):
        found = load_hub_rows(REPOSITORY, CONFIG, part, cache_dir=cache_dir, token=token)
    return tuple(str(row["text"]) for row in found), f"{REPOSITORY} {CONFIG} {part} (Hub)", ()


def _describe_substitute(path: Path) -> tuple[str, ...]:
    if path.name != SUBSTITUTE:
        return ()
    return ("WikiText-103's validation part stands in for WikiText-2's training part",)
