from __future__ import annotations

from pathlib import Path

import pytest

from cptq.data.files import find_data_directory, read_text, read_tsv
from cptq.errors import DataError


def test_text_is_read_with_one_kind_of_line_end_and_no_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert read_text(path) == "one\ntwo\nthree\n"


def test_the_offset_of_the_first_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf" + "\u00e9".encode() + b" caf\xe9 \xff")
    with pytest.raises(DataError, match=r"latin\.txt .*0xe9 .*9"):
        read_text(path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.txt"):
        read_text(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt"):
        read_text(tmp_path / "absent.txt")


def test_quotes_in_a_tsv_are_ordinary(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('"so it goes\t1\nhe said "no"\t0\n""\t1\n')
    expected = [(1, ['"so it goes', "1"]), (2, ['he said "no"', "0"]), (3, ['""', "1"])]
    assert list(read_tsv(path)) == expected


def test_the_data_directory_is_the_option_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_data_directory(None) is None
    monkeypatch.setenv("CPTQ_DATA", str(tmp_path))
    assert find_data_directory(None) == tmp_path
    (tmp_path / "other").mkdir()
    assert find_data_directory(tmp_path / "other") == tmp_path / "other"
    monkeypatch.setenv("CPTQ_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"CPTQ_DATA .*absent"):
        find_data_directory(None)
