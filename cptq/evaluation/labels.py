"""Whether a classifier's outputs are those of a task, and which output is which label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cptq.errors import EvaluationError
from cptq.types import Emit, Notice

_ENTAILED = ("entailment", "entailed")
_NOT_ENTAILED = ("not_entailment", "not_entailed", "non_entailment")
_NLI = (_ENTAILED, ("neutral",), ("contradiction", "contradictory"))
#: the names of labels and other spellings of them, by their place in the task
SYNONYMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "glue/sst2": (("negative", "neg"), ("positive", "pos")),
    "glue/cola": (
        ("unacceptable", "not_acceptable", "ungrammatical"),
        ("acceptable", "grammatical"),
    ),
    "glue/mrpc": (
        ("not_equivalent", "not_paraphrase", "non_paraphrase"),
        ("equivalent", "paraphrase"),
    ),
    "glue/qqp": (
        ("not_duplicate", "non_duplicate", "not_equivalent"),
        ("duplicate", "is_duplicate", "equivalent"),
    ),
    "glue/mnli": _NLI,
    "glue/mnli-mm": _NLI,
    "glue/qnli": (_ENTAILED, _NOT_ENTAILED),
    "glue/rte": (_ENTAILED, _NOT_ENTAILED),
    "glue/wnli": (_NOT_ENTAILED, _ENTAILED),
    "glue/ax": _NLI,
}
_UNNAMED = re.compile(r"(label_?)?\d+")


def class_order(config: Any, task: str, label_names: Sequence[str], emit: Emit) -> list[int]:
    """For each output of the model, the label of the task that it stands for.

    The names in `config.id2label` decide, so that a model whose outputs are in another order is
    read rightly. Names such as LABEL_0 say nothing; they are taken in the task's order (a Notice).

    Raises:
        EvaluationError: another number of outputs, or names that are not the task's.
    """
    names = [str(config.id2label[i]) for i in range(int(config.num_labels))]
    wanted = ", ".join(label_names)
    if len(names) != len(label_names):
        raise EvaluationError(
            f"the classifier has {len(names)} labels ({', '.join(names[:8])})",
            allowed=f"{len(label_names)} for {task} ({wanted})",
        )
    if all(_UNNAMED.fullmatch(name.lower()) for name in names):
        message = f"the labels {', '.join(names)} are taken for {wanted}, in this order"
        emit(Notice(kind="warning", subject=task, message=message))
        return list(range(len(names)))
    return _by_name(names, task, wanted)


def _by_name(names: list[str], task: str, wanted: str) -> list[int]:
    places = {name: place for place, spellings in enumerate(SYNONYMS[task]) for name in spellings}
    order = [places.get(re.sub(r"[\s-]+", "_", name.strip().lower()), -1) for name in names]
    if sorted(order) != list(range(len(names))):
        raise EvaluationError(
            f"the classifier's labels are {', '.join(names)}", allowed=f"{wanted} for {task}"
        )
    return order


def require_score(config: Any, task: str) -> None:
    """Refuse a classifier that does not give one number.

    Raises:
        EvaluationError: it has more outputs.
    """
    if int(config.num_labels) != 1:
        raise EvaluationError(
            f"the classifier has {config.num_labels} outputs",
            allowed=f"one, the score, for {task}",
        )
