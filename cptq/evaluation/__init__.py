"""What can be measured on a model, by name. Importing this loads no torch.

`cptq.evaluation.run.evaluate` runs a task; a text file is the task `text:PATH`, or just its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptq.data import SUFFIXES, check_source
from cptq.errors import EvaluationError, UnknownNameError
from cptq.registry import Registry, find_closest
from cptq.types import ModelKind

#: GLUE's tasks -> the function that measures them
_GLUE = {
    **dict.fromkeys(("glue/cola", "glue/sst2", "glue/mrpc"), "classes"),
    **dict.fromkeys(("glue/stsb", "glue/stsb-test"), "stsb"),
    **dict.fromkeys(("glue/qqp", "glue/mnli", "glue/mnli-mm", "glue/qnli"), "classes"),
    **dict.fromkeys(("glue/rte", "glue/wnli", "glue/ax"), "classes"),
}
#: sets of questions for language models, by the names that lm-evaluation-harness gives them
_CHOICES = (
    *("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "boolq", "openbookqa"),
    *("lambada_openai", "lambada_standard"),
)
#: GLUE by log-likelihood, by those names too (`glue/sst2` is for classifiers, `sst2` for LMs)
_ASKED_GLUE = ("cola", "sst2", "mrpc", "qqp", "mnli", "mnli_mismatch", "qnli", "rte", "wnli")
_LM_TASKS = {
    "wikitext": "wikitext:wikitext",
    **dict.fromkeys(("wikitext103", "ptb", "c4"), "corpora:corpus"),
    "pydoc": "text:pydoc",
    **dict.fromkeys(("wikitext-rolling", "c4-rolling"), "rolling:rolling"),
}
_ASKED = {
    **dict.fromkeys(_CHOICES, "zeroshot:choices"),
    **dict.fromkeys(_ASKED_GLUE, "zeroshot:glue"),
}
#: name -> a `cptq.evaluation.options.Task`
TASKS: Registry[Any] = Registry(
    "task",
    {
        **{name: f"cptq.evaluation.tasks.{place}" for name, place in _LM_TASKS.items()},
        **{name: f"cptq.evaluation.tasks.glue:{function}" for name, function in _GLUE.items()},
        **{name: f"cptq.evaluation.tasks.{place}" for name, place in _ASKED.items()},
        "footprint": "cptq.evaluation.footprint:footprint",
    },
)
TEXT_PREFIX = "text:"
#: tasks that read no text
TEXTLESS = ("footprint",)
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
    """The task meant by `name`: a registered name as it is, the path of a text as `text:PATH`.

    Raises:
        UnknownNameError: no such task; the message lists the names and the nearest one.
        DataError: the path of a text, and no such file is there or its kind is not read.
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


def tasks_for(kind: ModelKind) -> list[str]:
    """The names of the tasks that a model of this kind can be measured by."""
    names = [name for name in TASKS if kind in TASK_KINDS[name]]
    return [*names, "text:PATH"] if kind == "causal-lm" else names


def check_task_kind(name: str, kind: ModelKind) -> None:
    """Refuse a task that a model of this kind cannot do.

    Raises:
        EvaluationError: it cannot; the message lists the tasks that it can.
        UnknownNameError, DataError: as `check_task`.
    """
    known = check_task(name)
    kinds = TASK_KINDS["wikitext" if known.startswith(TEXT_PREFIX) else known]
    if kind not in kinds:
        raise EvaluationError(
            f"the task {name} is for a {' or '.join(kinds)}, and this model is a {kind}",
            allowed=f"{', '.join(tasks_for(kind))} for a {kind}",
            hint=_other_way(known, kind),
        )


def _other_way(name: str, kind: ModelKind) -> str | None:
    """The same data asked in the way of this kind of model, if there is one."""
    short = name.removeprefix("glue/").replace("mnli-mm", "mnli_mismatch")
    long = f"glue/{name}".replace("mnli_mismatch", "mnli-mm")
    other = short if kind == "causal-lm" else long
    same = other != name and other in TASKS and kind in TASK_KINDS[other]
    return f"for a {kind} it is the task {other}" if same else None
