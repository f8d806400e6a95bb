"""The embedded text: the language reference that every CPython carries in `pydoc_data.topics`.

About 0.46 MB of English in 79 topics. Topics repeat one another (`specialnames` contains
`attribute-access`), so that a split by topic alone would put calibration text into evaluation.
Going from the longest topic to the shortest, a paragraph of 40 characters and more is therefore
kept only where it first occurs; topics without a remaining paragraph are dropped. What remains,
about 0.37 MB, is split by the sha256 of the topic's name: a quarter of the names, about a quarter
of the text, for evaluation. The split of a topic is the same in all Python versions; its text may
differ.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping

from cptq.errors import DataError

LEAST_CHARACTERS = 40
EVALUATION_SHARE = 4  # one name in four


def load_topics() -> tuple[Mapping[str, str], str]:
    """Load the topics of this Python as name -> text, and where they come from.

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


def drop_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    """Keep each long paragraph only in the longest topic that has it; topics sorted by name."""
    seen: dict[str, str] = {}
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = topics[name].split("\n\n")
        own = [text for text in paragraphs if _is_short(text) or _is_first(text, name, seen)]
        if not all(_is_short(text) for text in own):
            kept[name] = "\n\n".join(own).strip("\n")
    return dict(sorted(kept.items()))


def _is_short(paragraph: str) -> bool:
    return len(_normalize(paragraph)) < LEAST_CHARACTERS


def _is_first(paragraph: str, name: str, seen: dict[str, str]) -> bool:
    return seen.setdefault(_normalize(paragraph), name) == name


def _normalize(paragraph: str) -> str:
    """Reduce a paragraph to its words (indentation differs between topics)."""
    return " ".join(paragraph.split())
