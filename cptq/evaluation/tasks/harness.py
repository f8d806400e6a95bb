"""EleutherAI's lm-evaluation-harness on a loaded model: `cptq eval --lm-eval TASKS`.

The model goes to the harness as it is, `HFLM(pretrained=module, tokenizer=tokenizer)`; a packed
checkpoint needs nothing else. Tasks are the harness's own, by name, or YAML files of more; data
come as the harness finds them, from the Hub or the cache of `datasets`. It is an extra, since it
brings some forty packages along.

Values are the harness's, and so are standard errors where it has them. It has none of word
perplexity, byte perplexity and bits per byte; but it keeps every document's log-likelihood and
count, whose ratio of sums they are, and so they get the error of a ratio with documents as the
independent samples, as `cptq.evaluation.perplexity` computes it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.data.files import read_text
from cptq.errors import EvaluationError, UnknownNameError
from cptq.evaluation.perplexity import apply_link, estimate_ratio
from cptq.evaluation.task import EvalOptions
from cptq.registry import find_closest
from cptq.types import Emit, EvalResult, Progress, SampleRatios, digest
from cptq.types.samples import Link, build_ratios

EXTRA = 'pip install "cptq[lm-eval]"'
PREFIX = "lm-eval/"
_SUFFIXES = (".yaml", ".yml")
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
_UNITS = {
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits per byte",
    "perplexity": "per word",
    "acc": "of questions",
    "acc_norm": "of questions",
}
_LOWER = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
#: metrics that are a ratio of sums over documents -> what becomes of the ratio
_SUMMED: Mapping[str, Link] = {
    "word_perplexity": "exp",
    "byte_perplexity": "exp",
    "bits_per_byte": "bits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """A task of the harness (or a group of tasks) with its data.

    It replaces the harness's task manager: `load` returns what was loaded before. Tasks may shuffle
    their documents with the global generators, which the harness seeds before it loads a task;
    `random_states` are those that loading left, so that a run goes on as if it had loaded it.
    """

    name: str
    given: str
    loaded: Mapping[str, Any]
    task_index: Mapping[str, Any]
    random_states: tuple[Any, Any, Any]

    def load(self, names: Any) -> Mapping[str, Any]:
        """Return the loaded tasks, whatever the names: there is one."""
        python, numpy, torch_state = self.random_states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        return self.loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedHarness:
    """Tasks of the harness, loaded; `limit` as the harness takes it."""

    tasks: tuple[LoadedTask, ...]
    limit: float | None
    name: str = "lm-eval"
    fingerprint: None = None

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """Every string in the documents that the harness is going to ask about."""
        return {
            f"{PREFIX}{name}": _collect_texts(task, self.limit)
            for group in self.tasks
            for name, task in group.loaded["tasks"].items()
        }

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Run the harness on each task.

        Raises:
            EvaluationError: a task cannot be run.
        """
        lm_eval, total = import_harness(), len(self.tasks)
        found: list[EvalResult] = []
        with _silence():
            runner = _build_runner(model, options)
            for done, task in enumerate(self.tasks):
                emit(Progress(stage=self.name, done=done, total=total, message=task.name))
                begin = time.perf_counter()
                with _explain_errors(task.name, task.given):
                    answer = lm_eval.simple_evaluate(
                        model=runner,
                        tasks=[task.name],
                        task_manager=task,
                        limit=self.limit,
                        log_samples=True,
                        bootstrap_iters=1000,
                        **dict.fromkeys(_SEEDS, options.seed),
                    )
                found += read_results(answer, time.perf_counter() - begin)
        emit(Progress(stage=self.name, done=total, total=total))
        return found


def import_harness() -> Any:
    """Import the module `lm_eval`.

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


def prepare_harness(
    spec: ModelSpec, tasks: Sequence[str], options: EvalOptions, emit: Emit
) -> PreparedHarness:
    """Load tasks named as the harness names them, or in YAML files, with their data.

    Raises:
        EvaluationError: the harness is absent, the model is not a causal LM, or a task cannot be
            loaded.
        UnknownNameError: no such task; the message names the nearest.
    """
    if spec.kind != "causal-lm" or spec.tokenizer is None:
        raise EvaluationError(
            f"--lm-eval is for a causal-lm with a tokenizer, and {spec.source} is a {spec.kind}"
        )
    manager, names = resolve_tasks(tuple(tasks))
    loaded = []
    for name, given in zip(names, tasks, strict=True):
        with _silence(), _explain_errors(name, given):
            loaded.append(_load(manager, name, given, options.seed))
    limit = None if options.limit == 1 else options.limit
    return PreparedHarness(tasks=tuple(loaded), limit=limit)


def _load(manager: Any, name: str, given: str, seed: int) -> LoadedTask:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = LoadedTask(
        name=name,
        given=given,
        loaded=manager.load([name]),
        task_index=getattr(manager, "task_index", {}),
        random_states=(random.getstate(), np.random.get_state(), torch.get_rng_state()),
    )
    for task in found.loaded["tasks"].values():
        len(task.eval_docs)  # raises if the task has no documents to evaluate
    return found


def _collect_texts(task: Any, limit: float | None) -> tuple[str, ...]:
    documents = task.eval_docs
    asked = islice(documents, EvalOptions(limit=limit).count(len(documents)))
    return tuple(text for document in asked for text in _find_strings(document))


def _find_strings(value: Any) -> list[str]:
    """Find the strings in the fields of a document, however deep; images and numbers have none."""
    if isinstance(value, str):
        return [value]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return (
        [text for part in parts for text in _find_strings(part)] if isinstance(parts, list) else []
    )


def _build_runner(model: LoadedModel, options: EvalOptions) -> Any:
    harness_model = import_module("lm_eval.models.huggingface").HFLM
    return harness_model(
        pretrained=model.module,
        tokenizer=model.tokenizer,
        batch_size=options.batch_size,
        max_length=options.seqlen,
    )


@lru_cache(maxsize=1)
def resolve_tasks(tasks: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Return the harness's task manager and the names to run; a file has its name inside.

    Raises:
        EvaluationError: the harness is absent, or a file is, or names no task.
        UnknownNameError: no such task; the message names the nearest.
    """
    import_harness()
    module = import_module("lm_eval.tasks")
    files = {t: Path(t).expanduser() for t in tasks if t.lower().endswith(_SUFFIXES)}
    names = [_read_name(files[task]) if task in files else task for task in tasks]
    folders = list(dict.fromkeys(str(file.parent.resolve()) for file in files.values()))
    # reading all of the harness's own tasks takes many seconds
    own = len(files) < len(tasks)
    with _silence():
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


def _read_name(file: Path) -> str:
    """Read the task's name in a YAML file (which may hold tags that only the harness knows)."""
    if not file.is_file():
        raise EvaluationError(f"no file {str(file)!r}", hint="check the path of the task")
    lines = read_text(file).splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("task:")]
    if not named or not named[0]:
        raise EvaluationError(f"{file} names no task", allowed="a line `task: NAME`")
    return named[0].strip("'\"")


@contextlib.contextmanager
def _explain_errors(task: str, given: str) -> Iterator[None]:
    """Raise what the harness raises about a task as an `EvaluationError`."""
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
def _silence() -> Iterator[None]:
    """Send what the harness prints to stderr, and let it log errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


def read_results(answer: Mapping[str, Any], seconds: float) -> list[EvalResult]:
    """Read the harness's results; a group's own line, which has no samples, is one of them."""
    found = []
    for task, values in answer["results"].items():
        samples = answer.get("samples", {}).get(task, [])
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            parts = _read_samples(samples, metric, float(value))
            stated = values.get(f"{metric}_stderr,{filtered}")
            found.append(
                EvalResult(
                    task=f"{PREFIX}{task}",
                    version=_read_version(answer.get("versions", {}).get(task)),
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=_choose_stderr(stated, parts),
                    unit=_UNITS.get(metric, ""),
                    higher_is_better=_is_higher_better(answer, task, metric),
                    samples=_count_samples(answer, task, samples),
                    seconds=seconds,
                    data_source="lm-evaluation-harness",
                    data_fingerprint=_compute_fingerprint(samples),
                    per_sample=parts,
                    notes=(f"lm-eval {_read_release()}",),
                )
            )
    return found


def _read_version(stated: Any) -> int:
    """Read the harness's version, such as 1.0; 0 where a task has none."""
    return int(stated) if isinstance(stated, int | float) else 0


def _is_higher_better(answer: Mapping[str, Any], task: str, metric: str) -> bool:
    stated = answer.get("higher_is_better", {}).get(task, {}).get(metric)
    return bool(stated) if stated is not None else metric not in _LOWER


def _count_samples(answer: Mapping[str, Any], task: str, samples: Sequence[Any]) -> int:
    counted = answer.get("n-samples", {}).get(task, {}).get("effective")
    return int(counted) if isinstance(counted, int) else len(samples)


def _compute_fingerprint(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Combine the harness's hashes of the documents; None where it kept no samples."""
    hashes = [str(sample.get("doc_hash", "")) for sample in samples]
    return digest(hashes) if hashes and all(hashes) else None


def _read_samples(
    samples: Sequence[Mapping[str, Any]], metric: str, value: float
) -> SampleRatios | None:
    """Read each document's part, where the value is the mean or the ratio of these parts."""
    values = [sample.get(metric) for sample in samples]
    if values and all(isinstance(item, int | float) for item in values):
        found = build_ratios([float(item) for item in values if item is not None])
    elif metric in _SUMMED and values and all(map(_is_pair, values)):
        pairs = [item for item in values if item is not None]
        found = build_ratios(
            [-float(a) for a, _ in pairs], [float(b) for _, b in pairs], _SUMMED[metric]
        )
    else:
        return None
    return found if abs(found.value - value) < 1e-6 * max(1.0, abs(value)) else None


def _is_pair(item: Any) -> bool:
    """Whether this is (log-likelihood, count) of a document."""
    return isinstance(item, Sequence) and len(item) == 2


def _choose_stderr(stated: Any, parts: SampleRatios | None) -> float | None:
    """Take the harness's standard error, or that of a ratio for summed metrics, which have none."""
    if isinstance(stated, int | float):
        return float(stated)
    if parts is None or not parts.denominators:
        return None
    sums = estimate_ratio(np.array(parts.numerators), np.array(parts.denominators))
    return apply_link(sums, parts.link).stderr


def _read_release() -> str:
    version: str = import_module("importlib.metadata").version("lm-eval")
    return version
