"""The other corpora of published perplexities: WikiText-103, Penn Treebank and C4.

Each as the GPTQ repository feeds it to a model (there `ptb-new` and `c4-new`):

- WikiText-103's test part, rows joined as WikiText-2's are. It is the same text as WikiText-2's
  test part; the original `.tokens` file has rare words as <unk>, which is said.
- Penn Treebank's test part: its lines, stripped, joined by a space.
- C4: the first 1,100 documents of the first English validation file, joined by a space; the first
  256 windows of the text are measured.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from cptq.data.files import (
    WAYS,
    MissingDataError,
    data_directory,
    first_existing,
    looked_in,
    read_text,
)
from cptq.data.hub import hub_rows
from cptq.data.text import Text
from cptq.data.wikitext import REPOSITORY as WIKITEXT
from cptq.data.wikitext import SEPARATOR, rows
from cptq.errors import DataError

C4_FILE = "c4-validation.00000-of-00008.json"
C4_DOCUMENTS, C4_WINDOWS = 1100, 256
_FILES = {
    "wikitext103": (
        "wikitext-103-raw/wiki.test.raw",
        "wikitext-103/wiki.test.raw",
        "wikitext-103/wiki.test.tokens",
    ),
    "ptb": ("ptb/ptb.test.txt", "simple-examples/data/ptb.test.txt"),
    "c4": tuple(f"{folder}/{C4_FILE}{end}" for folder in ("c4/en", "c4") for end in (".gz", "")),
}
CORPORA = tuple(_FILES)


def load_corpus(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> Text:
    """The evaluation text of wikitext103, ptb or c4.

    Raises:
        MissingDataError: neither local nor to be had from the Hub; says where was looked.
        DataError: empty, not UTF-8, or a line of C4 that is no JSON with a text.
    """
    separator, notes = (SEPARATOR if name == "wikitext103" else " "), tuple[str, ...]()
    if name == "c4":
        texts, origin = c4_rows(data_dir=data_dir, cache_dir=cache_dir, token=token)
        documents = texts[:C4_DOCUMENTS]
    else:
        documents, origin = _lines(name, data_dir, cache_dir, token)
    if origin.endswith(".tokens"):
        notes = ("the .tokens file of WikiText-103 has rare words as <unk>",)
    return Text(
        source=name,
        split="evaluation",
        documents=documents,
        separator=separator,
        origin=origin,
        notes=notes,
    )


def _lines(
    name: str, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> tuple[tuple[str, ...], str]:
    root = data_directory(data_dir)
    path = first_existing(root, _FILES[name])
    if path is not None:
        text = read_text(path)
        stripped = tuple(line.strip() for line in text.removesuffix("\n").split("\n"))
        return (stripped if name == "ptb" else rows(text)), str(path)
    repository, config, column, revision = {
        "wikitext103": (WIKITEXT, "wikitext-103-raw-v1", "text", None),
        # the repository itself holds a script, which `datasets` no longer runs
        "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "refs/convert/parquet"),
    }[name]
    try:
        found = hub_rows(
            repository, config, "test", cache_dir=cache_dir, token=token, revision=revision
        )
    except MissingDataError as error:
        raise _missing(name, root, error) from error
    return tuple(str(row[column]) for row in found), f"{repository} {config} test (Hub)"


def c4_rows(
    *, data_dir: Path | None, cache_dir: Path | None, token: str | None
) -> tuple[tuple[str, ...], str]:
    """(documents, origin) of the first English validation file of C4.

    Raises:
        MissingDataError, DataError: as `load_corpus`.
    """
    root = data_directory(data_dir)
    path = first_existing(root, _FILES["c4"])
    if path is not None:
        return _json_texts(path), str(path)
    try:
        found = hub_rows(
            "allenai/c4",
            "en",
            "validation",
            cache_dir=cache_dir,
            token=token,
            data_files={"validation": f"en/{C4_FILE}.gz"},
        )
    except MissingDataError as error:
        raise _missing("c4", root, error) from error
    return tuple(str(row["text"]) for row in found), f"allenai/c4 en/{C4_FILE} (Hub)"


def _missing(name: str, root: Path | None, error: MissingDataError) -> MissingDataError:
    looked = looked_in(root, _FILES[name][:1])
    return MissingDataError(f"no {name} text: {looked}; {error.problem}", hint=WAYS)


def _json_texts(path: Path) -> tuple[str, ...]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            texts = tuple(str(json.loads(line)["text"]) for line in lines if line.strip())
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no JSON lines file with the key text: {error}") from error
    if not any(text.strip() for text in texts):
        raise DataError(f"{path} is empty", hint="give the original file")
    return texts
