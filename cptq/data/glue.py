"""Labelled sentences of GLUE's tasks, from the original TSV files or from the Hub.

The files and columns of each task are a table of its own, `cptq.data.glue_layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cptq.data.files import (
    explain_missing,
    find_data_directory,
    find_first,
    read_tsv,
)
from cptq.data.glue_layouts import GLUE_TASKS, STSB_TEST, GlueSplit, Layout
from cptq.data.hub import load_hub_rows
from cptq.errors import DataError, UnknownNameError
from cptq.registry import find_closest
from cptq.types import digest

REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class GlueSet:
    """Sentences and labels in the order of the file.

    `sentences[i]` holds one or two sentences, `labels[i]` a class (0, 1, 2) or a score in [0, 5].
    `label_names` is empty for a score; `notes` state what was left out.
    """

    task: str
    split: GlueSplit
    sentences: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    label_names: tuple[str, ...]
    origin: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> GlueSet:
        """Take the first `count` samples."""
        return replace(self, sentences=self.sentences[:count], labels=self.labels[:count])

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) of sentences and labels."""
        return digest([self.sentences, self.labels])


def load_glue(
    task: str,
    split: GlueSplit,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> GlueSet:
    """Load one part of a task: cola, sst2, mrpc, stsb, qqp, mnli, mnli-mm, qnli, rte, wnli or ax.

    Raises:
        UnknownNameError: another task.
        DataError: missing, empty, not UTF-8, columns missing, a label out of range, or a part that
            the task does not have with labels.
    """
    layout = _find_layout(task, split)
    root = find_data_directory(data_dir)
    candidates = [f"{parent}{name}" for name in layout.files[split] for parent in ("glue/", "")]
    path = find_first(root, candidates)
    if path is not None:
        rows, notes = _read(path, layout)
        return _build(task, split, layout, rows, str(path), notes)
    part = layout.hub_splits[split]
    with explain_missing(f"GLUE {task} {split}", root, candidates[:1]):
        found = load_hub_rows(REPOSITORY, layout.hub, part, cache_dir=cache_dir, token=token)
    rows = [(number, _read_hub_row(row, layout)) for number, row in enumerate(found, start=1)]
    return _build_hub_set(task, split, layout, rows, f"{REPOSITORY} {layout.hub} {part} (Hub)")


def _find_layout(task: str, split: GlueSplit) -> Layout:
    if task not in GLUE_TASKS:
        near = find_closest(task, list(GLUE_TASKS))
        raise UnknownNameError(
            f"unknown GLUE task {task!r}",
            allowed=", ".join(GLUE_TASKS),
            hint=f"did you mean {near!r}?" if near else None,
        )
    layout = STSB_TEST if (task, split) == ("stsb", "test") else GLUE_TASKS[task]
    if split not in layout.files:
        why = "the labels are not public" if split == "test" else "there is none"
        raise DataError(f"no {split} part of GLUE {task}: {why}", allowed=", ".join(layout.files))
    return layout


Fields = tuple[tuple[str, ...], str]
Row = tuple[int, Fields]


def _read(path: Path, layout: Layout) -> tuple[list[Row], tuple[str, ...]]:
    """Read (line number, (sentences, label)) of every line of a TSV, and what was left out."""
    lines = list(read_tsv(path))
    places = [int(column) for column in _list_columns(layout)] if not layout.header else []
    if layout.header:
        _, header = lines.pop(0)
        missing = [str(name) for name in _list_columns(layout) if name not in header]
        if missing:
            raise DataError(
                f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(header)}"
            )
        places = [header.index(str(name)) for name in _list_columns(layout)]
    kept = lines
    if layout.has_broken_rows:
        kept = [line for line in lines if len(line[1]) > max(places)]
    lost = len(lines) - len(kept)
    notes = (f"{lost} lines of {path.name} with too few columns were left out",) if lost else ()
    return [(number, _pick_fields(path, number, fields, places)) for number, fields in kept], notes


def _list_columns(layout: Layout) -> tuple[str | int, ...]:
    return (*layout.sentences, layout.label)


def _pick_fields(path: Path, number: int, fields: list[str], places: list[int]) -> Fields:
    if len(fields) <= max(places):
        raise DataError(
            f"{path} line {number} has {len(fields)} columns, at least {max(places) + 1} needed"
        )
    *sentences, label = (fields[place] for place in places)
    return tuple(sentences), label


def _read_hub_row(row: Mapping[str, Any], layout: Layout) -> Fields:
    return tuple(str(row[name]) for name in layout.hub_sentences), str(row["label"])


def _build_hub_set(
    task: str, split: GlueSplit, layout: Layout, rows: list[Row], origin: str
) -> GlueSet:
    if rows and all(label == "-1" for _, (_, label) in rows):
        files = " or ".join(f"glue/{name}" for name in layout.files[split])
        raise DataError(f"{origin} has no labels", hint=f"put {files} below --data-dir")
    return _build(task, split, replace(layout, named=False), rows, origin, ())


def _build(
    task: str,
    split: GlueSplit,
    layout: Layout,
    rows: list[Row],
    origin: str,
    notes: tuple[str, ...],
) -> GlueSet:
    if not rows:
        raise DataError(f"{origin} has no rows")
    return GlueSet(
        task=task,
        split=split,
        sentences=tuple(sentences for _, (sentences, _) in rows),
        labels=tuple(_parse_label(label, layout, origin, number) for number, (_, label) in rows),
        label_names=layout.label_names,
        origin=origin,
        notes=notes,
    )


def _parse_label(text: str, layout: Layout, origin: str, number: int) -> float:
    known = layout.label_names if layout.named else tuple(map(str, range(len(layout.label_names))))
    if known:
        if text.strip() in known:
            return known.index(text.strip())
    elif (score := _parse_score(text)) is not None:
        return score
    raise DataError(
        f"{origin} line {number} has the label {text!r}",
        allowed=", ".join(known) or "a score from 0 to 5",
    )


def _parse_score(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None
