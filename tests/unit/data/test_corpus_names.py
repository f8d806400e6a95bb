"""Texts of one corpus have one name, whatever the source, task or file is called."""

from __future__ import annotations

import pytest

from cptq.data.corpus_names import name_corpus


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext", "wikitext"),
        ("wikitext103", "wikitext"),
        ("wikitext-rolling", "wikitext"),
        ("wiki.valid.tokens", "wikitext"),
        ("data/wiki.test.raw", "wikitext"),
        ("pydoc", "pydoc"),
        ("ptb", "ptb"),
        ("ptb.train.txt", "ptb"),
        ("c4-rolling", "c4"),
        ("c4.jsonl", "c4"),
        ("/home/me/notes.txt", "notes.txt"),
        ("wiki.txt", "wiki.txt"),
        ("c4d.txt", "c4d.txt"),
    ],
)
def test_a_corpus_is_known_by_its_names(name: str, expected: str) -> None:
    assert name_corpus(name) == expected
