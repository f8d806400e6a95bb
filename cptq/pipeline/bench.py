"""`cptq bench`: several models side by side, one process each, in turns.

All processes are alive at once. In each repetition every model gets its turn at each batch size,
and the order rotates from repetition to repetition, so that other work on the machine and its clock
rate meet all models alike; only one process computes at a time. The files are read once before, so
that all are loaded from the system's cache, where it holds them.

Everybody reads the same prompt: random ids of a fixed seed that the smallest vocabulary has.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cptq.artifact.atomic import refuse_existing, write_file
from cptq.config import BenchSettings, command_line
from cptq.evaluation.fresh_process import Worker
from cptq.pipeline.bench_subjects import (
    CAUSAL,
    LLAMA_CPP,
    Subject,
    check_alike,
    check_lengths,
    describe_subjects,
    read_into_cache,
)
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.summarize import collect_versions
from cptq.report.bench import Bench, BenchedModel, BenchOutcome
from cptq.report.render import format_json
from cptq.types import Emit, Figure, Progress

PROCESS = "cptq.evaluation.bench.process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One measurement: which repetition, batch size and model (an index)."""

    repeat: int
    batch_size: int
    model: int


def bench(settings: BenchSettings, emit: Emit) -> BenchOutcome:
    """Measure models in turns.

    Raises:
        ModelError: a model is not found, or cannot be measured.
        UsageError: models of several kinds, or a prompt that a context does not hold.
        EvaluationError: a process ended.
        OutputExistsError: the output exists and may not be replaced.
    """
    recorder = Recorder(emit)
    if settings.out is not None:
        refuse_existing(settings.out, overwrite=settings.overwrite)
    threads = settings.threads or torch.get_num_threads()
    with recorder.stage("prepare"):
        subjects = describe_subjects(settings, recorder)
        check_alike(subjects)
        check_lengths(subjects, settings.prompt_tokens, settings.new_tokens)
        for subject in subjects:
            read_into_cache(subject.path)
    models = measure(settings, subjects, threads, recorder)
    found = Bench(
        command_line=command_line(settings),
        models=tuple(models),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_sizes=settings.batch_size,
        repeats=settings.repeats,
        threads=threads,
        seed=settings.seed,
        cpu=read_cpu_name(),
        versions=_collect_versions(subjects),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notices=tuple(recorder.notices),
        timings=dict(recorder.timings),
    )
    if settings.out is not None:
        content = format_json({"command": "bench", **found.to_dict()})
        write_file(settings.out, content, overwrite=settings.overwrite)
    return BenchOutcome(bench=found, out=settings.out)


def draw_prompt(rows: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Draw `rows` lists of `tokens` ids below `vocabulary`; same seed, same ids."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(tokens)] for _ in range(rows)]


def plan_turns(models: int, batch_sizes: Sequence[int], repeats: int) -> list[Turn]:
    """Plan all measurements: models take turns, the first of them rotates with the repetition."""
    return [
        Turn(repeat=repeat, batch_size=size, model=(repeat + place) % models)
        for repeat in range(repeats)
        for size in batch_sizes
        for place in range(models)
    ]


def measure(
    settings: BenchSettings, subjects: Sequence[Subject], threads: int, recorder: Recorder
) -> list[BenchedModel]:
    """Start a process for each model, let them take turns, and return all figures.

    Raises:
        EvaluationError: a process ended.
    """
    sizes, smallest = settings.batch_size, min(subject.vocabulary for subject in subjects)
    rows = {
        size: draw_prompt(size, settings.prompt_tokens, smallest, settings.seed) for size in sizes
    }
    with ExitStack() as stack:
        workers, starts = [], []
        with recorder.stage("load"):
            for done, subject in enumerate(subjects):
                recorder(_advance("load", done, len(subjects), subject.name))
                job = _build_job(settings, subject, threads)
                worker = stack.enter_context(Worker(subject.name, PROCESS, job, threads))
                loaded = worker.ask(do="load")
                # the first run in a process: nothing has been set up in it before
                first = worker.ask(do="run", rows=rows[sizes[0]], new_tokens=settings.new_tokens)
                workers.append(worker)
                starts.append({**loaded, "first": first})
            recorder(_advance("load", len(subjects), len(subjects)))
        with recorder.stage("measure"):
            answers = _take_turns(settings, workers, rows, recorder)
        ends = [worker.ask(do="finish") for worker in workers]
    return [
        collect_figures(*found, settings)
        for found in zip(subjects, starts, answers, ends, strict=True)
    ]


Answers = dict[int, list[dict[str, Any]]]


def _take_turns(
    settings: BenchSettings,
    workers: Sequence[Worker],
    rows: Mapping[int, list[list[int]]],
    recorder: Recorder,
) -> list[Answers]:
    """Return, per model, the answers by batch size; a warm-up round is not among them."""
    answers: list[Answers] = [{size: [] for size in rows} for _ in workers]
    turns = plan_turns(len(workers), list(rows), 1 + settings.repeats)
    for done, turn in enumerate(turns):
        worker = workers[turn.model]
        recorder(_advance("measure", done, len(turns), f"{worker.name}, batch {turn.batch_size}"))
        ids = rows[turn.batch_size]
        answer = worker.ask(do="run", rows=ids, new_tokens=settings.new_tokens)
        if turn.repeat > 0:
            answers[turn.model][turn.batch_size].append(answer)
    recorder(_advance("measure", len(turns), len(turns)))
    return answers


def _advance(stage: str, done: int, total: int, message: str = "") -> Progress:
    return Progress(stage=stage, done=done, total=total, message=message)


def _build_job(settings: BenchSettings, subject: Subject, threads: int) -> dict[str, Any]:
    job: dict[str, Any] = {
        "engine": subject.engine,
        "path": str(subject.path),
        "threads": threads,
    }
    if subject.engine == LLAMA_CPP:
        return job | {
            "most_rows": max(settings.batch_size),
            "most_tokens": settings.prompt_tokens + settings.new_tokens,
        }
    return job | {
        "kind": subject.kind,
        "device": subject.device,
        "dtype": subject.dtype,
        "trust_remote_code": settings.model.trust_remote_code,
    }


def collect_figures(
    subject: Subject,
    loaded: Mapping[str, Any],
    answers: Answers,
    end: Mapping[str, float],
    settings: BenchSettings,
) -> BenchedModel:
    """Compute the figures of a model from what its process answered.

    Args:
        subject: the model.
        loaded: the answer to `load`, and under `first` that to the first run.
        answers: those of the repetitions by batch size.
        end: the answer to `finish`.
        settings: of the run.
    """
    generates, before = subject.kind == CAUSAL, loaded["import_bytes"]
    start = Figure(
        name="first_token" if generates else "first_output",
        values=(loaded["first"]["first_seconds"],),
        batch_size=settings.batch_size[0],
    )
    speeds = [
        figure
        for size, rows in answers.items()
        for figure in compute_speeds(rows, size, settings.prompt_tokens, settings.new_tokens)
    ]
    bytes_by_name = {
        "file": subject.file_bytes,
        "loaded_memory": loaded["loaded_bytes"] - before,
        "used_memory": end["used_bytes"] - before,
        "peak_memory": end["peak_bytes"] - before,
        "loaded_device_memory": loaded.get("loaded_device_bytes"),
        "peak_device_memory": end.get("peak_device_bytes"),
    }
    memory = [
        Figure(name=name, values=(float(value),))
        for name, value in bytes_by_name.items()
        if value is not None
    ]
    return BenchedModel(
        name=subject.name,
        source=subject.source,
        kind=subject.kind,
        way=loaded["first"]["way"],
        device=subject.device,
        dtype=subject.dtype,
        import_bytes=before,
        figures=(Figure(name="load", values=(loaded["load_seconds"],)), start, *speeds, *memory),
    )


def compute_speeds(
    answers: Sequence[Mapping[str, Any]], batch_size: int, prompt: int, new: int
) -> list[Figure]:
    """Compute tokens or sentences per second from the seconds of each repetition.

    Prefill: all prompt tokens over the time to the first new token. Decode: the other new tokens
    over the time they took. Without `later_seconds` it was a forward pass.
    """
    firsts = [answer["first_seconds"] for answer in answers]
    if "later_seconds" not in answers[0]:
        rates = tuple(batch_size / seconds for seconds in firsts)
        return [Figure(name="forward", values=rates, batch_size=batch_size)]
    prefill = tuple(batch_size * prompt / seconds for seconds in firsts)
    decode = tuple(batch_size * (new - 1) / answer["later_seconds"] for answer in answers)
    return [
        Figure(name="prefill", values=prefill, batch_size=batch_size),
        Figure(name="decode", values=decode, batch_size=batch_size),
    ]


def _collect_versions(subjects: Sequence[Subject]) -> dict[str, str]:
    found = dict(collect_versions())
    if any(subject.engine == LLAMA_CPP for subject in subjects):
        found["llama-cpp-python"] = version("llama-cpp-python")
    return found


def read_cpu_name() -> str:
    """Read the processor's name as the system calls it."""
    facts = Path("/proc/cpuinfo")
    named = find_cpu_name(facts.read_text(encoding="utf-8")) if facts.exists() else None
    return named or platform.processor() or platform.machine()


def find_cpu_name(text: str) -> str | None:
    """Find the first processor's name in the text of /proc/cpuinfo; None: it has none."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return None
