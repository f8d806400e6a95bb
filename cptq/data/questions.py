"""Rows of the multiple-choice sets, with the field names of the Hub's data sets.

Looked for as JSON lines in the data directory (`hellaswag/validation.jsonl`, one object a line with
the Hub's own fields), then on the Hub or in the cache of `datasets`. The parts are those that
lm-evaluation-harness scores: test where its labels are public, else validation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cptq.data.files import (
    explain_missing,
    find_data_directory,
    find_first,
    read_text,
)
from cptq.data.hub import load_hub_rows
from cptq.errors import DataError
from cptq.types import digest

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a set is stored: on the Hub, and in a data directory as `name/part.jsonl`."""

    repository: str
    config: str | None
    part: str
    fields: tuple[str, ...]


#: named as lm-evaluation-harness names its tasks
SOURCES: Mapping[str, Source] = {
    "hellaswag": Source(
        repository="Rowan/hellaswag",
        config=None,
        part="validation",
        fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "piqa": Source(
        repository="baber/piqa",
        config=None,
        part="validation",
        fields=("goal", "sol1", "sol2", "label"),
    ),
    "arc_easy": Source(
        repository="allenai/ai2_arc",
        config="ARC-Easy",
        part="test",
        fields=("question", "choices", "answerKey"),
    ),
    "arc_challenge": Source(
        repository="allenai/ai2_arc",
        config="ARC-Challenge",
        part="test",
        fields=("question", "choices", "answerKey"),
    ),
    "winogrande": Source(
        repository="allenai/winogrande",
        config="winogrande_xl",
        part="validation",
        fields=("sentence", "option1", "option2", "answer"),
    ),
    "boolq": Source(
        repository="aps/super_glue",
        config="boolq",
        part="validation",
        fields=("passage", "question", "label"),
    ),
    "openbookqa": Source(
        repository="allenai/openbookqa",
        config="main",
        part="test",
        fields=("question_stem", "choices", "answerKey"),
    ),
    "lambada_openai": Source(
        repository="EleutherAI/lambada_openai", config="default", part="test", fields=("text",)
    ),
    "lambada_standard": Source(
        repository="cimec/lambada", config=None, part="test", fields=("text",)
    ),
}


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Rows in the order of the file."""

    name: str
    rows: tuple[Row, ...]
    origin: str

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) of the fields of all rows that a prompt is made from."""
        fields = SOURCES[self.name].fields
        return digest([[row[field] for field in fields] for row in self.rows])


def load_questions(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> QuestionSet:
    """Load the rows of a set in `SOURCES`.

    Raises:
        DataError: missing, empty, not UTF-8, not JSON, or a field missing.
    """
    source, root = SOURCES[name], find_data_directory(data_dir)
    candidates = [f"{name}/{source.part}.jsonl"]
    path = find_first(root, candidates)
    if path is not None:
        rows, origin = _read(path), str(path)
    else:
        rows, origin = _load_from_hub(name, source, root, candidates, cache_dir, token)
    for number, row in enumerate(rows, start=1):
        missing = [field for field in source.fields if field not in row]
        if missing:
            raise DataError(
                f"{origin} line {number} lacks {', '.join(missing)}",
                allowed=f"the fields {', '.join(source.fields)}",
            )
    if not rows:
        raise DataError(f"{origin} has no rows")
    return QuestionSet(name=name, rows=tuple(rows), origin=origin)


def _load_from_hub(
    name: str,
    source: Source,
    root: Path | None,
    candidates: list[str],
    cache_dir: Path | None,
    token: str | None,
) -> tuple[list[dict[str, Any]], str]:
    with explain_missing(name, root, candidates):
        found = load_hub_rows(
            source.repository, source.config, source.part, cache_dir=cache_dir, token=token
        )
    words = filter(None, (source.repository, source.config, source.part))
    return found, f"{' '.join(words)} (Hub)"


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(path, number, line))
    return rows


def _parse_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number} is not a JSON object", allowed="one object a line")
    return row
