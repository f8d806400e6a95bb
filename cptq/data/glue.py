"""Labelled sentences of GLUE: SST-2, CoLA, STS-B, from the original TSV files or from the Hub.

The original files differ: SST-2 has a header "sentence, label"; CoLA has none (its columns are
source, label, the author's star, sentence); STS-B has ten columns by name, and its labelled test
part is the original one, without a header and with seven or nine columns. None is quoted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cptq.data.files import (
    WAYS,
    MissingDataError,
    data_directory,
    first_existing,
    looked_in,
    read_tsv,
)
from cptq.data.hub import hub_rows
from cptq.errors import DataError, UnknownNameError
from cptq.registry import closest
from cptq.types import digest

GlueSplit = Literal["train", "dev", "test"]
REPOSITORY = "nyu-mll/glue"
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a task lies on disk. Columns are names, or positions in a file without a header."""

    folder: str
    sentences: tuple[str | int, ...]
    label: str | int
    label_names: tuple[str, ...]  # empty: the label is a number to regress

    @property
    def header(self) -> bool:
        """Whether the first line names the columns."""
        return isinstance(self.label, str)


_STSB = ("sentence1", "sentence2")
GLUE_TASKS: Mapping[str, Layout] = {
    "sst2": Layout(
        folder="SST-2",
        sentences=("sentence",),
        label="label",
        label_names=("negative", "positive"),
    ),
    "cola": Layout(
        folder="CoLA", sentences=(3,), label=1, label_names=("unacceptable", "acceptable")
    ),
    "stsb": Layout(folder="STS-B", sentences=_STSB, label="score", label_names=()),
}
_STSB_TEST = Layout(folder="STS-B", sentences=(5, 6), label=4, label_names=())


@dataclass(frozen=True, kw_only=True)
class GlueSet:
    """Sentences and labels in the order of the file.

    `sentences[i]` holds one or two sentences, `labels[i]` a class (0, 1) or a score in [0, 5].
    `label_names` is empty for a score.
    """

    task: str
    split: GlueSplit
    sentences: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    label_names: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> GlueSet:
        """The first `count` samples."""
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
    """One part of sst2, cola or stsb.

    Raises:
        UnknownNameError: another task.
        DataError: missing (says where was looked), empty, not UTF-8, columns missing, a label out
            of range, or the test part of a task whose test labels are not public.
    """
    layout = _layout(task, split)
    root = data_directory(data_dir)
    name = "original/sts-test.tsv" if layout is _STSB_TEST else f"{split}.tsv"
    candidates = [f"{parent}{layout.folder}/{name}" for parent in ("glue/", "")]
    path = first_existing(root, candidates)
    if path is not None:
        return _build(task, split, layout, _read(path, layout), str(path))
    part = _HUB_SPLITS[split]
    try:
        found = hub_rows(REPOSITORY, task, part, cache_dir=cache_dir, token=token)
    except MissingDataError as error:
        looked = looked_in(root, candidates[:1])
        raise MissingDataError(
            f"no GLUE {task} {split}: {looked}; {error.problem}", hint=WAYS
        ) from error
    rows = [(number, _hub_fields(row, task)) for number, row in enumerate(found, start=1)]
    return _build(task, split, layout, rows, f"{REPOSITORY} {task} {part} (Hub)")


def _layout(task: str, split: GlueSplit) -> Layout:
    if task not in GLUE_TASKS:
        near = closest(task, list(GLUE_TASKS))
        raise UnknownNameError(
            f"unknown GLUE task {task!r}",
            allowed=", ".join(GLUE_TASKS),
            hint=f"did you mean {near!r}?" if near else None,
        )
    if split == "test" and task != "stsb":
        raise DataError(
            f"the labels of GLUE {task}'s test part are not public", allowed="train, dev"
        )
    return _STSB_TEST if split == "test" else GLUE_TASKS[task]


Row = tuple[int, tuple[tuple[str, ...], str]]


def _read(path: Path, layout: Layout) -> list[Row]:
    """(line number, (sentences, label)) of every line of a TSV file."""
    lines = read_tsv(path)
    columns = [*layout.sentences, layout.label]
    if layout.header:
        _, header = next(lines)
        missing = [str(name) for name in columns if name not in header]
        if missing:
            raise DataError(
                f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(header)}"
            )
        places = [header.index(str(name)) for name in columns]
    else:
        places = [int(column) for column in columns]
    return [(number, _fields(path, number, fields, places)) for number, fields in lines]


def _fields(
    path: Path, number: int, fields: list[str], places: list[int]
) -> tuple[tuple[str, ...], str]:
    if len(fields) <= max(places):
        raise DataError(
            f"{path} line {number} has {len(fields)} columns, at least {max(places) + 1} needed"
        )
    *sentences, label = (fields[place] for place in places)
    return tuple(sentences), label


def _hub_fields(row: Mapping[str, Any], task: str) -> tuple[tuple[str, ...], str]:
    names = _STSB if task == "stsb" else ("sentence",)
    return tuple(str(row[name]) for name in names), str(row["label"])


def _build(task: str, split: GlueSplit, layout: Layout, rows: list[Row], origin: str) -> GlueSet:
    if not rows:
        raise DataError(f"{origin} has no rows")
    return GlueSet(
        task=task,
        split=split,
        sentences=tuple(sentences for _, (sentences, _) in rows),
        labels=tuple(_label(label, layout, origin, number) for number, (_, label) in rows),
        label_names=layout.label_names,
        origin=origin,
    )


def _label(text: str, layout: Layout, origin: str, number: int) -> float:
    classes = len(layout.label_names)
    try:
        value = int(text) if classes else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= (classes - 1 if classes else 5):
        allowed = ", ".join(map(str, range(classes))) if classes else "a score from 0 to 5"
        raise DataError(f"{origin} line {number} has the label {text!r}", allowed=allowed)
    return value
