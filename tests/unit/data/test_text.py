from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cptq.data import Text, check_source, hub, load_text
from cptq.data.files import MissingDataError
from cptq.data.pydoc_text import drop_repeats, is_evaluation, load_topics
from cptq.data.wikitext import split_rows
from cptq.errors import DataError, UnknownNameError

RAW = " \n = Heading = \n \n First line . \n Second line . \n"


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text(RAW)
    return tmp_path


def test_rows_are_those_of_the_hub() -> None:
    """Lines keep their newline; lines of white space are empty rows."""
    assert split_rows(RAW) == ("", " = Heading = \n", "", " First line . \n", " Second line . \n")


def test_wikitext_joins_its_rows_by_two_newlines(wiki: Path) -> None:
    text = load_text("wikitext", "evaluation", data_dir=wiki)
    assert text.text == "\n\n = Heading = \n\n\n\n\n First line . \n\n\n Second line . \n"
    assert text.rows == ("= Heading =", "First line .", "Second line .")
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.origin.endswith("wiki.test.raw")


def test_real_wikitext_has_as_many_rows_as_on_the_hub(data_dir: Path) -> None:
    text = load_text("wikitext", "evaluation", data_dir=data_dir)
    assert len(text.documents) == 4358
    assert text.documents[:4] == ("", " = Robert Boulter = \n", "", text.documents[3])
    assert text.documents[3].startswith(" Robert Boulter is an English film")


def test_an_article_of_wikitext_begins_at_a_title_of_the_first_level(tmp_path: Path) -> None:
    (tmp_path / "wikitext-2-raw").mkdir()
    file = tmp_path / "wikitext-2-raw" / "wiki.test.raw"
    file.write_text(" \n = One = \n \n a = b \n = = Part = = \n c \n = Two = \n \n d \n")
    text = load_text("wikitext", "evaluation", data_dir=tmp_path)
    one = " = One = \n\n\n\n\n a = b \n\n\n = = Part = = \n\n\n c \n"
    assert text.articles == (one, " = Two = \n\n\n\n\n d \n")
    assert "\n\n".join(("", *text.articles)) == text.text
    # the file itself is that text too; a file of another name has a document a line
    assert [a.split("\n")[0] for a in load_text(str(file), "evaluation").articles] == [
        " = One = ",
        " = Two = ",
    ]
    other = file.rename(tmp_path / "other.txt")
    assert load_text(str(other), "evaluation").articles[:2] == (" = One = ", " a = b ")


def test_real_wikitext_has_its_articles(data_dir: Path) -> None:
    text = load_text("wikitext", "evaluation", data_dir=data_dir)
    assert 60 <= len(text.articles) <= 64
    assert text.articles[0].startswith(" = Robert Boulter = \n")


def test_pairs_are_those_of_a_task_of_two_sentences(tmp_path: Path) -> None:
    for folder, header, row in (
        ("RTE", "index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\tentailment"),
        ("SST-2", "sentence\tlabel", "one\t1"),
    ):
        (tmp_path / "glue" / folder).mkdir(parents=True)
        (tmp_path / "glue" / folder / "train.tsv").write_text(f"{header}\n{row}\n")
    text = load_text("glue/rte", "calibration", data_dir=tmp_path)
    assert (text.pairs, text.rows) == ((("one", "two"),), ("one", "two"))
    assert load_text("glue/sst2", "calibration", data_dir=tmp_path).pairs == ()


def test_calibration_never_takes_the_test_part(wiki: Path) -> None:
    with pytest.raises(MissingDataError, match="WikiText-2 train"):
        load_text("wikitext", "calibration", data_dir=wiki)
    (wiki / "wikitext-103").mkdir()
    (wiki / "wikitext-103" / "wiki.valid.tokens").write_text(" \n = Other = \n")
    text = load_text("wikitext", "calibration", data_dir=wiki)
    assert text.rows == ("= Other =",)
    assert "WikiText-103" in text.notes[0]
    (wiki / "wikitext-2-raw" / "wiki.train.raw").write_text(" = Train = \n")
    text = load_text("wikitext", "calibration", data_dir=wiki)
    assert (text.rows, text.notes) == (("= Train =",), ())


def test_missing_data_says_where_was_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError) as caught:
        load_text("wikitext", "evaluation", data_dir=tmp_path)
    for words in ("wikitext-2-raw/wiki.test.raw", str(tmp_path), "HF_HUB_OFFLINE", "--data-dir"):
        assert words in str(caught.value)


def test_auto_is_wikitext_where_it_is_and_pydoc_with_a_note_where_not(wiki: Path) -> None:
    assert load_text("auto", "evaluation", data_dir=wiki).source == "wikitext"
    text = load_text("auto", "evaluation")
    assert text.source == "pydoc"
    assert "wikitext" in text.notes[0]
    assert "CPTQ_DATA" in text.notes[0]


def test_auto_does_not_hide_malformed_data(wiki: Path) -> None:
    (wiki / "wikitext-2-raw" / "wiki.test.raw").write_bytes(b"\xff")
    with pytest.raises(DataError, match="offset 0"):
        load_text("auto", "evaluation", data_dir=wiki)
    with pytest.raises(DataError, match="absent"):
        load_text("auto", "evaluation", data_dir=wiki / "absent")


def test_an_unreachable_hub_is_noticed_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.5)
    with pytest.raises(MissingDataError, match=r"127\.0\.0\.1:9"):
        load_text("wikitext", "evaluation")
    assert load_text("auto", "evaluation").source == "pydoc"


def _words(text: Text) -> list[str]:
    return [row for row in text.rows if len(row) >= 40]


def test_pydoc_parts_are_disjoint_and_calibration_is_the_larger() -> None:
    calibration, evaluation = load_text("pydoc", "calibration"), load_text("pydoc", "evaluation")
    assert set(_words(calibration)).isdisjoint(_words(evaluation))
    assert len(calibration.text) > 2 * len(evaluation.text) > 100_000
    assert calibration.sha256 == load_text("pydoc", "calibration").sha256
    assert calibration.sha256 != evaluation.sha256


def test_pydoc_drops_only_repeats() -> None:
    topics, _ = load_topics()
    kept = "\n\n".join(drop_repeats(topics).values())
    before = {" ".join(p.split()) for text in topics.values() for p in text.split("\n\n")}
    after = {" ".join(p.split()) for p in kept.split("\n\n")}
    assert {p for p in before if len(p) >= 40} == {p for p in after if len(p) >= 40}


def test_a_repeat_stays_in_the_longest_topic() -> None:
    shared = "    A paragraph of more than forty characters, in two topics."
    topics = {"a": "short\n\n" + shared.strip(), "b": "A longer topic.\n\n" + shared, "c": "x" * 50}
    assert drop_repeats(topics) == {"b": topics["b"], "c": topics["c"]}


def test_the_split_of_a_topic_depends_on_its_name_alone() -> None:
    assert [name for name in ("assert", "debugger", "types", "yield") if is_evaluation(name)] == [
        "debugger",
        "types",
    ]


def test_a_text_file_is_its_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one  line\n\nanother\n")
    text = load_text(str(path), "calibration")
    assert text.text == "one  line\n\nanother\n"
    assert text.rows == ("one line", "another")
    assert (text.source, text.origin) == ("a.txt", str(path))


def test_a_test_part_named_for_calibration_is_remarked_on(wiki: Path) -> None:
    path = str(wiki / "wikitext-2-raw" / "wiki.test.raw")
    assert "wiki.test.raw" in load_text(path, "calibration").notes[0]
    assert load_text(path, "evaluation").notes == ()


def test_tables_and_json_lines_give_a_document_a_row(tmp_path: Path) -> None:
    tsv, jsonl = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    tsv.write_text('label\tsentence\n1\t"quoted\n0\tplain\n')
    jsonl.write_text('{"text": "one"}\n\n"two"\n')
    assert load_text(str(tsv), "calibration").documents == ('"quoted', "plain")
    assert load_text(str(jsonl), "calibration").documents == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", "x\ty\n1\t2\n", "(x, y)"),
        ("a.tsv", "text\ty\n1\n", "line 2 has 1"),
        ("a.tsv", "text\tlabel\n", "a.tsv"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "line 2"),
        ("a.jsonl", json.dumps({"body": "a"}), "line 1"),
        ("a.jsonl", "[1, 2]", "line 1"),
        ("a.txt", "\n", "a.txt"),
    ],
)
def test_a_malformed_file_names_what_is_wrong(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_text(str(tmp_path / name), "calibration")
    assert words in str(caught.value)


def test_sources_are_checked_by_name(tmp_path: Path) -> None:
    assert check_source("glue/sst2") == "glue/sst2"
    with pytest.raises(UnknownNameError, match="'wikitxt'") as caught:
        check_source("wikitxt")
    assert "'wikitext'" in str(caught.value.hint)
    (tmp_path / "a.pdf").write_text("x")
    for path in ("absent/text.txt", str(tmp_path / "a.pdf"), str(tmp_path)):
        with pytest.raises(DataError, match=path):
            check_source(path)


def test_the_room_needs_no_torch() -> None:
    code = "import sys, cptq.data; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
