"""What can be measured on a model, by name. Importing this loads no torch.

`cptq.evaluation.task` prepares and measures a task; a text file is the task `text:PATH`, or just
its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptq.data import SUFFIXES, check_source
from cptq.errors import EvaluationError, UnknownNameError
from cptq.registry import Entry, Facts, Registry, find_closest
from cptq.types import ModelKind

_GLUE = tuple(
    f"glue/{task}"
    for task in (
        *("cola", "sst2", "mrpc", "stsb", "stsb-test", "qqp"),
        *("mnli", "mnli-mm", "qnli", "rte", "wnli", "ax"),
    )
)
#: sets of questions for language models, by the names that lm-evaluation-harness gives them
_CHOICES = (
    *("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "boolq", "openbookqa"),
    *("lambada_openai", "lambada_standard"),
)
#: GLUE by log-likelihood, by those names too (`glue/sst2` is for classifiers, `sst2` for LMs)
_ASKED_GLUE = ("cola", "sst2", "mrpc", "qqp", "mnli", "mnli_mismatch", "qnli", "rte", "wnli")
_LM_TASKS = {
    **dict.fromkeys(("wikitext", "wikitext103", "ptb", "c4", "pydoc"), "text:prepare_text"),
    **dict.fromkeys(("wikitext-rolling", "c4-rolling"), "rolling:prepare_rolling"),
}
_ASKED = {
    **dict.fromkeys(_CHOICES, "zeroshot:prepare_choices"),
    **dict.fromkeys(_ASKED_GLUE, "zeroshot:prepare_glue_questions"),
}
_PLACES = {
    **_LM_TASKS,
    **dict.fromkeys(_GLUE, "glue:prepare_glue"),
    **_ASKED,
    "footprint": "footprint:prepare_footprint",
}
_TEXT, _SET = "perplexity of a language model", "accuracy of a classifier"
_ASKS = "accuracy of a language model by log-likelihood"
_WINDOWS = "a forward pass over the text, in windows"
_QUESTIONS = "a forward pass per answer"
_EACH = "a forward pass over the sentences"
_FACTS: Mapping[str, Facts] = {
    **{
        name: Facts(does=f"{_TEXT} on {text}", source=source, cost=_WINDOWS, good=good)
        for name, text, source, good in (
            ("wikitext", "WikiText-2", "arXiv 1609.07843", "the usual comparison; finds 1%"),
            ("wikitext103", "WikiText-103", "arXiv 1609.07843", "more text of the same kind"),
            ("ptb", "the Penn Treebank", "Marcus et al. 1993", "news, lower case"),
            ("c4", "C4", "arXiv 1910.10683", "the web"),
            ("pydoc", "Python's own manual", "", "where there are no data sets at all"),
            ("wikitext-rolling", "whole pages", "lm-evaluation-harness", "per byte and word"),
            ("c4-rolling", "whole documents", "lm-evaluation-harness", "per byte and word"),
        )
    },
    **{
        name: Facts(
            does=f"{_SET} on {name.removeprefix('glue/')}",
            source="GLUE (arXiv 1804.07461)",
            cost=_EACH,
            good="encoders; differences of 0.5% need the whole set",
        )
        for name in _GLUE
    },
    **{
        name: Facts(
            does=f"rank correlation of similarities on {split} pairs of STS-B",
            source="GLUE (arXiv 1804.07461)",
            cost=_EACH,
            good="sentence encoders",
        )
        for name, split in (
            ("glue/stsb", "the development"),
            ("glue/stsb-test", "the test"),
        )
    },
    **{
        name: Facts(
            does=f"{_ASKS} on {name}",
            source="lm-evaluation-harness",
            cost=_QUESTIONS,
            good="what users notice; noisier than perplexity and kl",
        )
        for name in _ASKED
    },
    "footprint": Facts(
        does="bytes, seconds to load, memory, tokens per second",
        cost="a process of its own",
        good="any model; cptq bench takes turns and is more exact",
    ),
}
#: name -> a `cptq.evaluation.task.Prepare`
TASKS: Registry[Any] = Registry(
    "task",
    {n: Entry(f"cptq.evaluation.tasks.{place}", _FACTS[n]) for n, place in _PLACES.items()},
)
TEXT_PREFIX = "text:"
_ALL_KINDS: tuple[ModelKind, ...] = ("causal-lm", "masked-lm", "classifier", "encoder")
#: which kinds of model a task can be run on; a text file is as wikitext
TASK_KINDS: Mapping[str, tuple[ModelKind, ...]] = {
    **dict.fromkeys(_LM_TASKS, ("causal-lm",)),
    **dict.fromkeys(_GLUE, ("classifier",)),
    **dict.fromkeys(("glue/stsb", "glue/stsb-test"), ("classifier", "encoder", "masked-lm")),
    **dict.fromkeys(_ASKED, ("causal-lm",)),
    "footprint": _ALL_KINDS,
}


def check_task(name: str) -> str:
    """Return the task's name: a registered name as it is, the path of a text as `text:PATH`.

    Raises:
        UnknownNameError: no such task; the message lists the names and the nearest one.
        DataError: the path of a text that does not exist, or of a kind that is not read.
    """
    if name in TASKS:
        return name
    path = name.removeprefix(TEXT_PREFIX)
    if name.startswith(TEXT_PREFIX) or Path(path).suffix.lower() in SUFFIXES:
        # "./" keeps a file called "wikitext" from being taken for the source of that name
        return TEXT_PREFIX + check_source(path if "/" in path or "." in path else f"./{path}")
    near = find_closest(name, TASKS.list_names())
    raise UnknownNameError(
        f"unknown task {name!r}",
        allowed=f"{', '.join(TASKS)}, or text:PATH for a file ({', '.join(SUFFIXES)})",
        hint=f"did you mean {near!r}?" if near else None,
    )


def list_tasks(kind: ModelKind) -> list[str]:
    """List the tasks that a model of this kind can be measured by."""
    names = [name for name in TASKS if kind in TASK_KINDS[name]]
    return [*names, "text:PATH"] if kind == "causal-lm" else names


def check_task_kind(name: str, kind: ModelKind) -> None:
    """Refuse a task that a model of this kind cannot do.

    Raises:
        EvaluationError: it cannot; the message lists the tasks that it can do.
        UnknownNameError, DataError: as `check_task`.
    """
    known = check_task(name)
    kinds = TASK_KINDS["wikitext" if known.startswith(TEXT_PREFIX) else known]
    if kind not in kinds:
        raise EvaluationError(
            f"the task {name} is for a {' or '.join(kinds)}, and this model is a {kind}",
            allowed=f"{', '.join(list_tasks(kind))} for a {kind}",
            hint=_suggest_counterpart(known, kind),
        )


def _suggest_counterpart(name: str, kind: ModelKind) -> str | None:
    """Name the task with the same data for this kind of model, if there is one."""
    short = name.removeprefix("glue/").replace("mnli-mm", "mnli_mismatch")
    long = f"glue/{name}".replace("mnli_mismatch", "mnli-mm")
    other = short if kind == "causal-lm" else long
    same = other != name and other in TASKS and kind in TASK_KINDS[other]
    return f"use the task {other} for a {kind}" if same else None
