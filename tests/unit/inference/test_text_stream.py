"""Pieces of a text: joined they are the text, and none is half a character."""

from __future__ import annotations

import pytest

from cptq.inference.text_stream import TextStream
from tests.tiny_models import tiny_tokenizer


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def take(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.finish()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert take(TextStream(decode_bytes), list("aé🙂b".encode())) == [
        *("a", "", "é", "", "", "", "🙂", "b", ""),
    ]


def test_bytes_that_are_no_text_are_not_waited_for_forever() -> None:
    pieces = take(TextStream(decode_bytes), [0x80, 0x80, 0x80, 0x80, 0x80, 0x61])
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 5 + "a"
    assert pieces[3]


def test_an_incomplete_end_is_shown_at_the_end() -> None:
    pieces = take(TextStream(decode_bytes), list("a🙂".encode())[:-1])
    assert pieces[:-1] == ["a", "", "", ""]
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_space_at_the_beginning_of_a_word_is_kept_after_a_prompt() -> None:
    """A tokenizer that drops the space before the first word, as SentencePiece does."""
    words = {1: " one", 2: " two", 3: " three"}

    def decode(ids: list[int]) -> str:
        return "".join(words[token] for token in ids).removeprefix(" ")

    assert take(TextStream(decode, [1]), [2, 3]) == [" two", " three", ""]
    assert take(TextStream(decode), [2, 3]) == ["two", " three", ""]


@pytest.mark.parametrize("text", ["The quick brown fox, 3.14!", "Grüße aus Łódź, 東京 🙂\n\n  x "])
def test_pieces_of_a_real_tokenizer_join_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer(causal=True)
    ids = tokenizer(text)["input_ids"]
    pieces = take(TextStream(tokenizer.decode, tokenizer("Once. ")["input_ids"]), ids)
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 5
