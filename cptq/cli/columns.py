"""Widths of a table's columns in a terminal, and text folded between words.

Rich takes width from the widest columns first, whatever words they hold, and so cuts words. Here
every column gets its longest word, and what is left goes to the columns in proportion to what they
lack. Only a word that does not fit any more is broken, after `/`, `_`, `-`, `.` or `:` where it can
be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: a part of a word, up to where it may be broken
_PART = re.compile(r"[^/_\-.:,=]*[/_\-.:,=]|[^/_\-.:,=]+")
#: least width of a column whose words are broken
LEAST = 8


def choose_widths(columns: Sequence[Sequence[str]], width: int, gap: int) -> list[int]:
    """Return the width of each column so that the table takes at most `width` characters.

    Args:
        columns: the texts of each column, its name included.
        width: characters of a line.
        gap: characters between two columns.
    """
    whole = [max(map(len, column), default=0) for column in columns]
    words = [
        max((len(w) for text in column for w in text.split()), default=0) for column in columns
    ]
    room = width - gap * (len(columns) - 1)
    if sum(whole) <= room:
        return whole
    while sum(words) > room and max(words) > LEAST:
        index = words.index(max(words))
        words[index] -= 1
    lacking = [most - least for most, least in zip(whole, words, strict=True)]
    spare, total = max(0, room - sum(words)), max(1, sum(lacking))
    return [w + spare * lack // total for w, lack in zip(words, lacking, strict=True)]


def fold_text(text: str, width: int) -> str:
    """Return a text as lines of at most `width` characters, broken between words."""
    return "\n".join(line for part in text.split("\n") for line in _fold_line(part, width))


def _fold_line(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) <= width:
            line += f" {word}"
            continue
        if line:
            lines.append(line)
        *full, line = _break_word(word, width)
        lines += full
    return [*lines, line]


def _break_word(word: str, width: int) -> list[str]:
    """Return a word in pieces of at most `width` characters, of whole parts where they fit."""
    if len(word) <= width:
        return [word]
    pieces = [""]
    for part in _PART.findall(word):
        if pieces[-1] and len(pieces[-1]) + len(part) > width:
            pieces.append("")
        pieces[-1] += part
        while len(pieces[-1]) > width:
            pieces[-1:] = [pieces[-1][:width], pieces[-1][width:]]
    return pieces
