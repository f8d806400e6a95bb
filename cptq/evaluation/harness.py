"""EleutherAI's lm-evaluation-harness on a loaded model: `cptq eval --lm-eval TASKS`.

The model goes to the harness as it is, `HFLM(pretrained=module, tokenizer=tokenizer)`; a packed
checkpoint needs nothing else. Tasks are the harness's own, by name, or YAML files of more; data
come as the harness finds them, from the Hub or the cache of `datasets`. It is an extra, since it
brings some forty packages along. What it answers is read in `cptq.evaluation.harness_results`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from cptq.checkpoint.model import LoadedModel
from cptq.data.files import read_text
from cptq.errors import EvaluationError, UnknownNameError
from cptq.evaluation.harness_results import PREFIX, harness_results
from cptq.evaluation.options import EvalOptions, unwatched
from cptq.registry import find_closest
from cptq.types import Emit, EvalResult, Notice, Progress

EXTRA = 'pip install "cptq[lm-eval]"'
_SUFFIXES = (".yaml", ".yml")


def require_harness() -> Any:
    """The module `lm_eval`.

    Raises:
        EvaluationError: it is not installed, or is broken.
    """
    try:
        return import_module("lm_eval")
    except ImportError as error:
        raise EvaluationError(
            f"--lm-eval needs lm-evaluation-harness, which cannot be imported ({error})",
            hint=f"install it: {EXTRA}",
        ) from error


def run_harness(
    model: LoadedModel, tasks: Sequence[str], options: EvalOptions, emit: Emit
) -> list[EvalResult]:
    """The harness's results of tasks named as it names them, or in YAML files.

    Raises:
        EvaluationError: the harness is absent, the model is no causal LM, or a task cannot be run.
        UnknownNameError: no such task; the message names the nearest.
    """
    lm_eval = require_harness()
    _check_kind(model)
    manager, names = resolve_tasks(tuple(tasks))
    found: list[EvalResult] = []
    with _quiet():
        runner = _runner(model, options)
        for done, task in enumerate(names):
            emit(Progress(stage="lm-eval", done=done, total=len(names), message=task))
            begin = time.perf_counter()
            with _one_sentence(task, tasks[done]):
                answer = _evaluate(lm_eval, runner, task, manager, options)
            found += harness_results(answer, time.perf_counter() - begin)
    emit(Progress(stage="lm-eval", done=len(names), total=len(names)))
    return found


def show_documents(
    model: LoadedModel, tasks: Sequence[str], options: EvalOptions, emit: Emit
) -> None:
    """Show `options.watch` all text in the documents that the harness is going to ask about.

    Raises:
        EvaluationError: as `run_harness`; or the guard is strict and found something.
    """
    if options.watch is unwatched:
        return
    _check_kind(model)
    manager, names = resolve_tasks(tuple(tasks))
    for name, given in zip(names, tasks, strict=True):
        with _quiet(), _one_sentence(name, given):
            loaded = manager.load([name])["tasks"]
            texts = {task: _texts(loaded[task], options) for task in loaded}
        for task, rows in texts.items():
            if not any(row.strip() for row in rows):
                message = "not compared with the calibration text: its documents hold no text"
                emit(Notice(kind="skipped", subject=f"{PREFIX}{task}", message=message))
            options.watch(f"{PREFIX}{task}", rows)


def _texts(task: Any, options: EvalOptions) -> list[str]:
    """Every string in the documents of a task of the harness, as many as are asked about."""
    documents = task.eval_docs
    asked = islice(documents, options.count(len(documents)))
    return [text for document in asked for text in _strings(document)]


def _strings(value: Any) -> list[str]:
    """The strings in the fields of a document, however deep; images and numbers have none."""
    if isinstance(value, str):
        return [value]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return [text for part in parts for text in _strings(part)] if isinstance(parts, list) else []


def _check_kind(model: LoadedModel) -> None:
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise EvaluationError(
            f"--lm-eval is for a causal-lm with a tokenizer, and {model.source} is a {model.kind}"
        )


def _runner(model: LoadedModel, options: EvalOptions) -> Any:
    harness_model = import_module("lm_eval.models.huggingface").HFLM
    return harness_model(
        pretrained=model.module,
        tokenizer=model.tokenizer,
        batch_size=options.batch_size,
        max_length=options.seqlen,
    )


@lru_cache(maxsize=1)
def resolve_tasks(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The harness's task manager and the names to run; files are registered by the name in them.

    Raises:
        EvaluationError: the harness is absent, or a file is, or names no task.
        UnknownNameError: no such task; the message names the nearest.
    """
    require_harness()
    module = import_module("lm_eval.tasks")
    files = [Path(task).expanduser() for task in tasks if task.lower().endswith(_SUFFIXES)]
    for file in files:
        if not file.is_file():
            raise EvaluationError(f"no file {str(file)!r}", hint="check the path of the task")
    names = [
        _name_in(Path(task).expanduser()) if task.lower().endswith(_SUFFIXES) else task
        for task in tasks
    ]
    folders = [str(folder) for folder in dict.fromkeys(file.parent.resolve() for file in files)]
    # reading all the harness's own tasks takes it many seconds
    own = len(files) < len(tasks)
    with _quiet():
        manager = module.TaskManager(include_path=folders or None, include_defaults=own)
    known = list(manager.all_tasks)
    for name, given in zip(names, tasks, strict=True):
        if name not in known and not manager.match_tasks([name]):
            if name != given:
                raise EvaluationError(f"lm-evaluation-harness finds no task {name!r} in {given}")
            near = find_closest(name, known)
            raise UnknownNameError(
                f"lm-evaluation-harness has no task {name!r}",
                allowed=f"the {len(known):,} names of `lm-eval ls tasks`, or a YAML file",
                hint=f"did you mean {near!r}?" if near else None,
            )
    return manager, names


def _name_in(file: Path) -> str:
    """The name of the task in a YAML file (which may hold tags that only the harness knows)."""
    lines = read_text(file).splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("task:")]
    if not named or not named[0]:
        raise EvaluationError(f"{file} names no task", allowed="a line `task: NAME`")
    return named[0].strip("'\"")


def _evaluate(
    lm_eval: Any, runner: Any, task: str, manager: Any, options: EvalOptions
) -> Mapping[str, Any]:
    limit = None if options.limit is None or options.limit == 1 else options.limit
    answer: Mapping[str, Any] = lm_eval.simple_evaluate(
        model=runner,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        log_samples=True,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        bootstrap_iters=1000,
    )
    return answer


@contextlib.contextmanager
def _one_sentence(task: str, given: str) -> Iterator[None]:
    """What the harness raises about a task, as one of ours; a file's author can mend the file."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        own = f"look at dataset_path and dataset_kwargs in {given}"
        raise EvaluationError(
            f"lm-evaluation-harness cannot run {task}: {type(error).__name__}: {reason}",
            hint=own if given != task else "its data come from the Hub or the cache of datasets",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints and logs; what it prints goes to stderr, and only errors are logged."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
