"""The files, columns and labels of each GLUE task, on disk and on the Hub: a table.

The original TSV files (Wang et al. 2018, gluebenchmark.com) differ from task to task: CoLA has no
header, MRPC, QQP and the inference tasks each name their columns differently, and labels are
numbers in some and words in others. None is quoted. The Hub's copy (`nyu-mll/glue`) has numbers
everywhere; `label_names` stand in the order of those numbers.

AX, the diagnostic set, is the full file with labels (`diagnostic-full.tsv`, 1,104 pairs): the copy
on the Hub and GLUE's `diagnostic.tsv` have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

GlueSplit = Literal["train", "dev", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One task. Columns are names, or positions in a file without a header.

    `files` are the names to try for each part, below a folder of GLUE; `hub` is the configuration
    and `hub_splits` its parts; `named`: the file's labels are words. In a file that
    `has_broken_rows` lines with too few columns are left out and counted.
    """

    files: Mapping[GlueSplit, tuple[str, ...]]
    sentences: tuple[str | int, ...]
    label: str | int
    label_names: tuple[str, ...]  # empty: the label is a number to regress
    hub: str
    hub_sentences: tuple[str, ...]
    hub_splits: Mapping[GlueSplit, str] = field(
        default_factory=lambda: {"train": "train", "dev": "validation"}
    )
    named: bool = False
    has_broken_rows: bool = False

    @property
    def header(self) -> bool:
        """Whether the first line names the columns."""
        return isinstance(self.label, str)


def _name_files(folder: str) -> dict[GlueSplit, tuple[str, ...]]:
    return {"train": (f"{folder}/train.tsv",), "dev": (f"{folder}/dev.tsv",)}


_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_TWO_WAY = ("entailment", "not_entailment")


def _describe_mnli(matched: str) -> Layout:
    return Layout(
        files={"train": ("MNLI/train.tsv",), "dev": (f"MNLI/dev_{matched}.tsv",)},
        sentences=_PAIR,
        label="gold_label",
        label_names=_NLI,
        named=True,
        hub="mnli",
        hub_sentences=("premise", "hypothesis"),
        hub_splits={"train": "train", "dev": f"validation_{matched}"},
    )


def _describe_stsb() -> Layout:
    return Layout(
        files=_name_files("STS-B"),
        sentences=_PAIR,
        label="score",
        label_names=(),
        hub="stsb",
        hub_sentences=_PAIR,
    )


GLUE_TASKS: Mapping[str, Layout] = {
    "cola": Layout(
        files=_name_files("CoLA"),
        sentences=(3,),
        label=1,
        label_names=("unacceptable", "acceptable"),
        hub="cola",
        hub_sentences=("sentence",),
    ),
    "sst2": Layout(
        files=_name_files("SST-2"),
        sentences=("sentence",),
        label="label",
        label_names=("negative", "positive"),
        hub="sst2",
        hub_sentences=("sentence",),
    ),
    "mrpc": Layout(
        files=_name_files("MRPC"),
        sentences=("#1 String", "#2 String"),
        label="Quality",
        label_names=("not_equivalent", "equivalent"),
        hub="mrpc",
        hub_sentences=_PAIR,
    ),
    "stsb": _describe_stsb(),
    "qqp": Layout(
        files=_name_files("QQP"),
        sentences=("question1", "question2"),
        label="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        hub="qqp",
        hub_sentences=("question1", "question2"),
        has_broken_rows=True,
    ),
    "mnli": _describe_mnli("matched"),
    "mnli-mm": _describe_mnli("mismatched"),
    "qnli": Layout(
        files=_name_files("QNLI"),
        sentences=("question", "sentence"),
        label="label",
        label_names=_TWO_WAY,
        named=True,
        hub="qnli",
        hub_sentences=("question", "sentence"),
    ),
    "rte": Layout(
        files=_name_files("RTE"),
        sentences=_PAIR,
        label="label",
        label_names=_TWO_WAY,
        named=True,
        hub="rte",
        hub_sentences=_PAIR,
    ),
    "wnli": Layout(
        files=_name_files("WNLI"),
        sentences=_PAIR,
        label="label",
        label_names=("not_entailment", "entailment"),
        hub="wnli",
        hub_sentences=_PAIR,
    ),
    "ax": Layout(
        files={"dev": tuple(f"{f}/diagnostic-full.tsv" for f in ("AX", "diagnostic", "MNLI"))},
        sentences=("Premise", "Hypothesis"),
        label="Label",
        label_names=_NLI,
        named=True,
        hub="ax",
        hub_sentences=("premise", "hypothesis"),
        hub_splits={"dev": "test"},
    ),
}

#: the labelled test part of STS-B: the original file, without a header, with seven or nine columns
STSB_TEST = Layout(
    files={"test": ("STS-B/original/sts-test.tsv",)},
    sentences=(5, 6),
    label=4,
    label_names=(),
    hub="stsb",
    hub_sentences=_PAIR,
    hub_splits={"test": "test"},
)
#: tasks with a training part of their own
TRAINED = tuple(task for task in GLUE_TASKS if task not in ("mnli-mm", "ax"))
