"""Reading files that people made: bytes to text, tables to rows, and where data is looked for."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cptq.errors import DataError

#: the ways to supply missing data, said at the end of every "not found"
WAYS = "name a directory in the original layout with --data-dir or CPTQ_DATA"


class MissingDataError(DataError):
    """The data is nowhere to be had; what is there but malformed is a plain `DataError`."""


def data_directory(data_dir: Path | None) -> Path | None:
    """`--data-dir` if it was given, else CPTQ_DATA if it is set, else None.

    Raises:
        DataError: the directory that was named is not there.
    """
    named, by = (data_dir, "--data-dir") if data_dir else (os.environ.get("CPTQ_DATA"), "CPTQ_DATA")
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        raise DataError(f"{by} names {str(path)!r}, which is no directory", hint=WAYS)
    return path


def first_existing(root: Path | None, candidates: Iterable[str]) -> Path | None:
    """The first of `candidates` (relative to `root`) that is a file."""
    if root is None:
        return None
    return next((root / name for name in candidates if (root / name).is_file()), None)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n", without a byte order mark.

    Raises:
        DataError: unreadable, not UTF-8 (with the offset of the first bad byte), or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}",
            hint=f"convert it, for example: iconv -f latin1 -t utf-8 {path.name} > utf8.txt",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DataError(f"{path} is empty", hint="give a file with text in it")
    return text


def read_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields) of every line; quotes are ordinary characters.

    GLUE's files are not quoted: a sentence may begin with a quotation mark, which a usual CSV
    reader would take for a field over many lines.

    Raises:
        DataError: as `read_text`.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        yield from enumerate(rows, start=1)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as TSV: {error}") from error


def looked_in(root: Path | None, candidates: Iterable[str]) -> str:
    """Words for where a file was looked for in vain."""
    if root is None:
        return "neither --data-dir nor CPTQ_DATA is given"
    return f"no {' or '.join(candidates)} in {root}"
