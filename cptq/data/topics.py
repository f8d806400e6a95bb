"""The embedded text: the language reference that every CPython carries in `pydoc_data.topics`.

About 0.46 MB of English in 79 topics. Topics repeat one another (`specialnames` contains
`attribute-access`), so that a split by topic alone would let calibration text into evaluation.
Going from the longest topic to the shortest, a paragraph of 40 characters and more is therefore
kept only where it first occurs; topics of which nothing is left drop out. What remains, about
0.37 MB, is split by the sha256 of the topic's name: a quarter of the names, about a quarter of the
text, for evaluation. The split of a topic does not move between Python versions; its text may.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping

from cptq.errors import DataError

LEAST_CHARACTERS = 40
EVALUATION_SHARE = 4  # one name in four


def load_topics() -> tuple[Mapping[str, str], str]:
    """The topics of this Python as name -> text, and words for where they come from.

    Raises:
        DataError: this Python was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data.topics, the embedded text",
            hint="name a text file instead, or install the full standard library",
        ) from error
    return topics, f"pydoc_data.topics of CPython {platform.python_version()}"


def is_evaluation(name: str) -> bool:
    """Whether the topic called `name` belongs to the evaluation part."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % EVALUATION_SHARE == 0


def without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    """The topics, sorted by name, each long paragraph only in the longest topic that has it."""
    seen: dict[str, str] = {}
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = topics[name].split("\n\n")
        own = [text for text in paragraphs if _short(text) or _first(text, name, seen)]
        if not all(_short(text) for text in own):
            kept[name] = "\n\n".join(own).strip("\n")
    return dict(sorted(kept.items()))


def _short(paragraph: str) -> bool:
    return len(_key(paragraph)) < LEAST_CHARACTERS


def _first(paragraph: str, name: str, seen: dict[str, str]) -> bool:
    return seen.setdefault(_key(paragraph), name) == name


def _key(paragraph: str) -> str:
    """What makes two paragraphs the same: their words (indentation differs between topics)."""
    return " ".join(paragraph.split())
