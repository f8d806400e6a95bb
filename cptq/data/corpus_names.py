"""Which corpus a text is of, by the name of a source, a task or a file.

A model that was calibrated on one part of a corpus does better on another part of it than on other
text: its perplexity there is in-domain. The leak check (`cptq.data.overlap`) compares passages and
finds nothing of that, since the parts share none; names tell. WikiText-2 and WikiText-103 are one
corpus. Limit: a file under a name of its own is a corpus of its own.
"""

from __future__ import annotations

import re
from pathlib import PurePath

_PATTERNS = {
    "wikitext": re.compile(r"wikitext|wiki\.(train|valid|test)\."),
    "ptb": re.compile(r"ptb(?![a-z0-9])"),
    "c4": re.compile(r"c4(?![a-z0-9])"),
}


def name_corpus(name: str) -> str:
    """Name the corpus: "wikitext" for `wikitext103` and wiki.valid.tokens, else a file's name."""
    last = PurePath(name).name
    found = (corpus for corpus, known in _PATTERNS.items() if known.match(last.lower()))
    return next(found, last)
