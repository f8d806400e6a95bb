"""Text by name: `load_text("wikitext", "calibration")` and others. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from cptq.data.corpus_names import name_corpus
from cptq.data.files import MissingDataError, read_text, read_tsv
from cptq.data.glue import load_glue
from cptq.data.glue_layouts import TRAINED
from cptq.data.pydoc_text import drop_repeats, is_evaluation, load_topics
from cptq.data.wikitext import SEPARATOR, load_wikitext, split_articles
from cptq.errors import DataError, UnknownNameError
from cptq.registry import find_closest

Split = Literal["calibration", "evaluation"]
SOURCES = ("auto", "wikitext", "pydoc", *(f"glue/{task}" for task in TRAINED))
SUFFIXES = (".txt", ".tsv", ".jsonl", ".raw", ".tokens")
TEXT_COLUMNS = ("sentence", "text", "content", "sentence1", "sentence2")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A body of text and where it comes from.

    `documents` joined by `separator` are `text`, which is what language models are fed; `sha256`
    is of that in UTF-8. `rows` are the sentences and paragraphs, which is what encoders are fed.
    `pairs` are the two sentences of each sample of a task of pairs, which is what its classifiers
    are fed; empty for any other text.
    """

    source: str
    origin: str
    split: Split
    documents: tuple[str, ...]
    separator: str
    notes: tuple[str, ...] = ()
    pairs: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def text(self) -> str:
        """The whole text."""
        return self.separator.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) of `text` in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def articles(self) -> tuple[str, ...]:
        """The texts that belong together: WikiText's articles, else the documents; no empty one."""
        of_wikitext = name_corpus(self.source) == "wikitext"
        rows = self.documents
        found = split_articles(rows, self.separator) if of_wikitext else rows
        return tuple(article for article in found if article.strip())

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The documents cut at blank lines, white space made single, empty ones dropped."""
        pieces = (piece for document in self.documents for piece in document.split("\n\n"))
        return tuple(row for piece in pieces if (row := " ".join(piece.split())))


def check_source(source: str) -> str:
    """Return `source` if it names a source or a file of a readable kind.

    Raises:
        UnknownNameError: it is neither; the message lists the names and the nearest one.
        DataError: it is the path of a file that does not exist, or of a kind that is not read.
    """
    if source in SOURCES:
        return source
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES and not path.exists():
        near = find_closest(source, list(SOURCES))
        raise UnknownNameError(
            f"unknown text source {source!r}",
            allowed=f"{', '.join(SOURCES)}, or the path of a file ({', '.join(SUFFIXES)})",
            hint=f"did you mean {near!r}?" if near else None,
        )
    if not path.is_file():
        raise DataError(f"no file {source!r}", hint="check the path of the text")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{source} is not a kind of text file that cptq reads", allowed=_join(SUFFIXES)
        )
    return source


def load_text(
    source: str,
    split: Split,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> Text:
    """Load the text called `source`.

    Args:
        source: "wikitext"; "pydoc", the embedded text; "glue/sst2" and the like (one
            sentence a document: the training part to calibrate, dev to evaluate); the path of a
            .txt (or .raw, .tokens), .tsv or .jsonl file, the same for both splits; "auto":
            wikitext if it is available, else pydoc with a note.
        data_dir: as `--data-dir`; None means CPTQ_DATA.
        cache_dir, token: for `datasets`.

    Raises:
        DataError: missing, empty, not UTF-8 or without the columns it needs.
        UnknownNameError: as `check_source`.
    """
    check_source(source)
    if source == "auto":
        return _load_auto(split, data_dir, cache_dir, token)
    if source == "wikitext":
        documents, origin, notes = load_wikitext(
            split, data_dir=data_dir, cache_dir=cache_dir, token=token
        )
        return _build_text("wikitext", split, documents, SEPARATOR, origin, notes)
    if source == "pydoc":
        return _load_pydoc(split)
    if source.startswith("glue/"):
        return _load_sentences(source, split, data_dir, cache_dir, token)
    return load_file(Path(source).expanduser(), split)


def load_file(path: Path, split: Split) -> Text:
    """Load a file as text: .tsv and .jsonl one document per row, others one document per line.

    A TSV needs a header with one of the columns sentence, text, content, or sentence1 and
    sentence2 (a document each). A JSON line is a string or an object with such a key.

    Raises:
        DataError: empty, not UTF-8, no such column or key, a line that is not JSON.
    """
    readers = {".tsv": _read_tsv_documents, ".jsonl": _read_jsonl_documents}
    reader = readers.get(path.suffix.lower())
    notes: tuple[str, ...] = ()
    if split == "calibration" and "test" in path.stem.lower().replace("_", ".").split("."):
        notes = (f"{path.name} looks like a test part; results on the same text mean nothing",)
    documents = reader(path) if reader else tuple(read_text(path).split("\n"))
    return _build_text(path.name, split, documents, "\n\n" if reader else "\n", str(path), notes)


def _build_text(
    source: str,
    split: Split,
    documents: tuple[str, ...],
    separator: str,
    origin: str,
    notes: tuple[str, ...] = (),
) -> Text:
    if not any(document.strip() for document in documents):
        raise DataError(f"{origin} holds no text")
    return Text(
        source=source,
        split=split,
        documents=documents,
        separator=separator,
        origin=origin,
        notes=notes,
    )


def _load_auto(
    split: Split, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> Text:
    try:
        return load_text("wikitext", split, data_dir=data_dir, cache_dir=cache_dir, token=token)
    except MissingDataError as error:
        text = _load_pydoc(split)
        note = f"the embedded text pydoc stands in for wikitext ({error})"
        return _build_text("pydoc", split, text.documents, text.separator, text.origin, (note,))


def _load_pydoc(split: Split) -> Text:
    topics, origin = load_topics()
    wanted = split == "evaluation"
    documents = tuple(
        text for name, text in drop_repeats(topics).items() if is_evaluation(name) is wanted
    )
    return _build_text("pydoc", split, documents, "\n\n", origin)


def _load_sentences(
    source: str, split: Split, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> Text:
    part: Literal["train", "dev"] = "train" if split == "calibration" else "dev"
    found = load_glue(
        source.removeprefix("glue/"), part, data_dir=data_dir, cache_dir=cache_dir, token=token
    )
    documents = tuple(sentence for pair in found.sentences for sentence in pair)
    text = _build_text(source, split, documents, "\n", found.origin, found.notes)
    return replace(text, pairs=found.sentences if len(found.sentences[0]) == 2 else ())


def _read_tsv_documents(path: Path) -> tuple[str, ...]:
    lines = read_tsv(path)
    _, header = next(lines)
    columns = [header.index(name) for name in TEXT_COLUMNS if name in header]
    if not columns:
        raise DataError(
            f"{path} has no text column in its first line ({_join(header)})",
            allowed=_join(TEXT_COLUMNS),
            hint="add a header line",
        )
    documents = []
    for number, fields in lines:
        if len(fields) != len(header):
            raise DataError(
                f"{path} line {number} has {len(fields)} columns, its header {len(header)}"
            )
        documents += [fields[column] for column in columns]
    return tuple(documents)


def _read_jsonl_documents(path: Path) -> tuple[str, ...]:
    lines = enumerate(read_text(path).split("\n"), start=1)
    return tuple(_parse_json_text(path, number, line) for number, line in lines if line.strip())


def _parse_json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not JSON: {error.msg}") from error
    if isinstance(value, str):
        return value
    fields = value if isinstance(value, dict) else {}
    texts = [fields[name] for name in TEXT_COLUMNS if isinstance(fields.get(name), str)]
    if not texts:
        raise DataError(
            f"{path} line {number} has no text",
            allowed=f"a string, or a key {_join(TEXT_COLUMNS)}",
        )
    return "\n\n".join(texts)


def _join(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names)
