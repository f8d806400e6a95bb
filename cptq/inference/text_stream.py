"""Text from tokens as they come: each piece as soon as it can no longer change.

Tokens of one text are decoded together with a few before them, because a token's text depends on
its neighbours: a byte-level token may hold part of a character, and SentencePiece drops a space at
the beginning. What is new is what the longer sequence decodes to beyond the shorter one. While it
ends in U+FFFD, a character is incomplete and is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
#: tokens before the new ones that are decoded along
CONTEXT = 6
#: an incomplete character: at most 4 bytes, each its own token; more than this is invalid text
LONGEST = 4


class TextStream:
    """Pieces of the text of new tokens; joined they are the whole text.

    Args:
        decode: text of token ids.
        before: the ids of the prompt.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self.decode = decode
        self.ids = list(before[-CONTEXT:])
        self.start = 0
        self.read = len(self.ids)

    def add(self, token: int) -> str:
        """Return the text that a further token completes; empty if it completes none."""
        self.ids.append(token)
        return self._take(at_end=False)

    def finish(self) -> str:
        """Return what is still held back."""
        return self._take(at_end=True)

    def _take(self, *, at_end: bool) -> str:
        shown = self.decode(self.ids[self.start : self.read])
        text = self.decode(self.ids[self.start :])
        waits = text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.read < LONGEST
        if len(text) <= len(shown) or (waits and not at_end):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(shown) :]
