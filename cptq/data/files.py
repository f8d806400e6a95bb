"""Find and read data files: bytes to text, tables to rows."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cptq.errors import DataError

#: how to supply missing data, the hint of every "not found"
WAYS = "name a directory in the original layout with --data-dir or CPTQ_DATA"


class MissingDataError(DataError):
    """The data is not found; data that is found but malformed is a plain `DataError`."""


def find_data_directory(data_dir: Path | None) -> Path | None:
    """Return `--data-dir` if it is given, else CPTQ_DATA if it is set, else None.

    Raises:
        DataError: the directory does not exist.
    """
    named, by = (data_dir, "--data-dir") if data_dir else (os.environ.get("CPTQ_DATA"), "CPTQ_DATA")
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        raise DataError(f"{by} names {str(path)!r}, which is not a directory", hint=WAYS)
    return path


def find_first(root: Path | None, candidates: Iterable[str]) -> Path | None:
    """Find the first of `candidates` (relative to `root`) that is a file."""
    if root is None:
        return None
    return next((root / name for name in candidates if (root / name).is_file()), None)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, line ends as "\\n", without a byte order mark.

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
    """Read (line number from 1, fields) of every line; quotes are ordinary characters.

    GLUE's files are not quoted: a sentence may begin with a quotation mark, which an ordinary CSV
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


@contextmanager
def explain_missing(what: str, root: Path | None, candidates: Iterable[str]) -> Iterator[None]:
    """Add to a `MissingDataError` what is missing and which files were looked for in `root`."""
    try:
        yield
    except MissingDataError as error:
        looked = "neither --data-dir nor CPTQ_DATA is given"
        if root is not None:
            looked = f"no {' or '.join(candidates)} in {root}"
        raise MissingDataError(f"no {what}: {looked}; {error.problem}", hint=WAYS) from error
