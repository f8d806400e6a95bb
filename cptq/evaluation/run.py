"""One door to all tasks."""

from __future__ import annotations

from typing import cast

from cptq.checkpoint.model import LoadedModel
from cptq.evaluation import TASKS, TEXT_PREFIX, check_task, check_task_kind
from cptq.evaluation.options import EvalOptions, Task
from cptq.evaluation.tasks.text import text_file
from cptq.types import Emit, EvalResult


def evaluate(model: LoadedModel, task: str, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Measure a model by a task; one result per metric, the task's main metric first.

    Args:
        task: a name in `cptq.evaluation.TASKS`, `text:PATH`, or the path of a text file.

    Raises:
        UnknownNameError: no such task.
        EvaluationError: the model cannot do it (its kind, its labels, no tokenizer), or its
            outputs are not finite.
        DataError: the data is missing, empty or malformed.
    """
    check_task_kind(task, model.kind)
    name = check_task(task)
    run = text_file if name.startswith(TEXT_PREFIX) else cast(Task, TASKS.get(name))
    return run(model, name, options, emit)
