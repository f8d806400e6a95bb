"""Tables at the width of a terminal: words stay whole."""

from __future__ import annotations

import random

import pytest

from cptq.cli.columns import choose_widths, fold_text
from cptq.cli.console import Console
from cptq.report.formatting import Table
from tests.unit.cli.conftest import Cptq

WORDS = ("perplexity", "model.layers.0.mlp.down_proj", "0.1834", "a", "of", "bits", "-", "71.9%")


@pytest.mark.parametrize("seed", range(20))
def test_columns_take_their_longest_word_where_the_line_has_room(seed: int) -> None:
    draw = random.Random(seed)
    columns = [
        [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(4)]
        for _ in range(draw.randint(2, 4))
    ]
    widths = choose_widths(columns, 80, 2)
    longest = [max(len(word) for text in column for word in text.split()) for column in columns]
    assert sum(widths) + 2 * (len(columns) - 1) <= 80
    whole = sum(longest) + 2 * (len(columns) - 1) <= 80
    for column, width, least in zip(columns, widths, longest, strict=True):
        assert width >= least or not whole
        for text in column:
            lines = fold_text(text, width).split("\n")
            assert max(map(len, lines)) <= width
            if whole:
                assert " ".join(lines).split() == text.split()


def test_a_word_that_does_not_fit_is_broken_at_its_parts() -> None:
    assert fold_text("see /some/long/place/file.json", 12) == "see\n/some/long/\nplace/file.\njson"
    assert fold_text("abcdefghij", 4) == "abcd\nefgh\nij"
    assert fold_text("", 4) == ""


@pytest.mark.parametrize(
    "line", ["analyze m", "compress m", "eval m", "compare a b -o c", "methods", "doctor"]
)
def test_no_table_of_a_command_is_wider_than_80_columns(line: str, cptq: Cptq) -> None:
    found = cptq(*line.split())
    assert found.exit_code == 0, found.output
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_words_of_a_wide_table_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = ("a rather long explanation of what is meant here", "perplexity per token", "12,345")
    table = Table(
        title="t", columns=("what is named", "metric", "bytes", "more words"), right=("bytes",),
        rows=((texts[0], texts[1], texts[2], texts[0]),) * 2,
    )  # fmt: skip
    Console().print_table(table)
    shown = capsys.readouterr().out
    for word in {word for text in texts for word in text.split()}:
        assert word in shown
