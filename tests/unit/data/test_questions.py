from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cptq.data.corpora import C4_FILE, load_corpus, load_pages, split_pages
from cptq.data.files import MissingDataError
from cptq.data.questions import load_questions
from cptq.errors import DataError

ROW = {"goal": "open", "sol1": "pull", "sol2": "push", "label": 0}


def piqa(folder: Path, content: str | bytes) -> Path:
    (folder / "piqa").mkdir()
    place = folder / "piqa" / "validation.jsonl"
    place.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_rows_are_read_from_the_data_directory(tmp_path: Path) -> None:
    lines = "".join(json.dumps({**ROW, "label": i}) + "\n\n" for i in (0, 1))
    found = load_questions("piqa", data_dir=piqa(tmp_path, lines))
    assert [row["label"] for row in found.rows] == [0, 1]
    assert found.origin.endswith("piqa/validation.jsonl")


def test_the_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    for number, extra in enumerate(({}, {"unused": 1}, {"goal": "shut"})):
        (tmp_path / str(number)).mkdir()
        piqa(tmp_path / str(number), json.dumps({**ROW, **extra}))
    one, two, three = (load_questions("piqa", data_dir=tmp_path / str(n)).sha256 for n in range(3))
    assert one == two != three


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", r"validation\.jsonl"),
        (b"caf\xe9", "0xe9 at offset 3"),
        (b"{}\n", "line 1 .*goal, sol1, sol2, label"),
        (b"[1]\n", "line 1 .*object"),
        (b'{"goal": \n', "line 1 .*JSON"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: bytes, named: str) -> None:
    with pytest.raises(DataError, match=named):
        load_questions("piqa", data_dir=piqa(tmp_path, content))


def test_missing_data_names_the_file_that_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"hellaswag/validation\.jsonl"):
        load_questions("hellaswag", data_dir=tmp_path)
    for name in ("wikitext103", "ptb", "c4"):
        with pytest.raises(MissingDataError, match=f"no {name} .*{name[:3]}"):
            load_corpus(name, data_dir=tmp_path)
    with pytest.raises(MissingDataError, match=r"wikitext-2-raw/wiki\.test\.raw"):
        load_pages("wikitext-rolling", data_dir=tmp_path, cache_dir=None, token=None)


def test_ptb_is_its_stripped_lines_with_a_space_between(tmp_path: Path) -> None:
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" no it was n't <unk> monday \n but while \n")
    assert load_corpus("ptb", data_dir=tmp_path).text == "no it was n't <unk> monday but while"


def test_wikitext103_is_joined_as_wikitext_2_is(tmp_path: Path) -> None:
    (tmp_path / "wikitext-103").mkdir()
    (tmp_path / "wikitext-103" / "wiki.test.tokens").write_text(" \n = A = \n \n b <unk> \n")
    found = load_corpus("wikitext103", data_dir=tmp_path)
    assert found.text == "\n\n = A = \n\n\n\n\n b <unk> \n"
    assert len(found.notes) == 1
    assert "<unk>" in found.notes[0]


@pytest.mark.parametrize("packed", [True, False])
def test_c4_is_its_first_1100_documents(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "c4").mkdir()
    lines = "".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(1105)).encode()
    place = tmp_path / "c4" / (C4_FILE + (".gz" if packed else ""))
    place.write_bytes(gzip.compress(lines) if packed else lines)
    found = load_corpus("c4", data_dir=tmp_path)
    assert (len(found.documents), found.text[:5], found.text[-5:]) == (1100, "d0 d1", "d1099")
    assert (
        len(load_pages("c4-rolling", data_dir=tmp_path, cache_dir=None, token=None).documents)
        == 1105
    )
    place.write_bytes(b"broken")
    with pytest.raises(DataError, match="JSON lines"):
        load_corpus("c4", data_dir=tmp_path)


def test_pages_begin_at_headings_of_the_first_level() -> None:
    raw = " \n = A = \n a \n = = B = = \n b \n = C = \n c \n"
    assert split_pages(raw) == (" = A = \n a \n = = B = = \n b ", " = C = \n c \n")
