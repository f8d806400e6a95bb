"""Speed and memory of what `cptq compress` wrote, beside the dense model: a few seconds at its end.

The written directory is opened as `cptq.load` opens it, in this process. The dense model is the one
in memory: its weights are compressed values by now, in the same shapes and types, and take the same
time. Both read a prompt and write a few tokens in turns, after a round to warm up, until
`BUDGET_SECONDS` are over, at least once and at most `REPEATS` times.

    weights in memory = bytes of all parameters and buffers, each tensor once
    prefill           = prompt tokens / seconds to the first new token
    decode            = other new tokens / seconds that they took

Bytes are counted, so they are exact. Resident memory is not read: that of a process that has just
compressed a model says nothing about one that opens it. `cptq bench` measures it, in fresh
processes, as it does load times; the report holds that command.

Limits: one sequence at a time and short texts; with few repetitions, other work on the machine
shows. Skipped with --no-eval, and where memory does not hold the model as a whole. Nothing of it is
in the manifest, or decides anything.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cptq.checkpoint.loader import open_module
from cptq.errors import CptqError
from cptq.evaluation.bench.with_transformers import run_rows
from cptq.pipeline.bench import compute_speeds, draw_prompt
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
from cptq.types import Emit, ModelSpeed, Notice, Progress, SpeedReport

STAGE = "speed"
PROMPT_TOKENS, NEW_TOKENS = 64, 9
BUDGET_SECONDS, REPEATS = 4.0, 5
DENSE, COMPRESSED, STOCK = "dense", "compressed, in cptq", "compressed, in transformers"


def count_weight_bytes(module: nn.Module) -> int:
    """Count the bytes of all parameters and buffers; what is tied, or shares memory, once."""
    tensors = [*module.parameters(), *module.buffers()]
    found = {(t.data_ptr(), t.nbytes): t.nbytes for t in tensors if t.nbytes}
    return sum(found.values())


def measure_speed(
    inputs: CompressInputs, folder: Path, stock_bytes: int | None, recorder: Recorder
) -> SpeedReport:
    """Measure the dense model and the artifact in `folder`; what cannot be is said in a notice.

    Args:
        inputs: of the run, whose model is in memory.
        folder: the artifact as written.
        stock_bytes: of the weights that stock transformers held after a forward pass, if known.
        recorder: receives progress and notices.
    """
    command = shlex.join(["cptq", "bench", inputs.model.source, str(inputs.out)])
    if not inputs.settings.evaluate:
        return SpeedReport(command=command, why="--no-eval")
    if not inputs.model.held_whole:
        return _skip(command, "memory does not hold the model as a whole", recorder)
    try:
        with recorder.stage(STAGE):
            return _measure(inputs, folder, stock_bytes, command, recorder)
    # whatever a model's own code raises: the artifact is complete, and this is only about its speed
    except Exception as error:
        words = " ".join(str(error).split())
        why = words if isinstance(error, CptqError) else f"{type(error).__name__}: {words}"
        return _skip(command, why, recorder)


def _skip(command: str, why: str, emit: Emit) -> SpeedReport:
    message = f"speed and memory were not measured ({why}); {command} measures them"
    emit(Notice(kind="skipped", subject=STAGE, message=message))
    return SpeedReport(command=command, why=why)


def _measure(
    inputs: CompressInputs,
    folder: Path,
    stock_bytes: int | None,
    command: str,
    recorder: Recorder,
) -> SpeedReport:
    model = inputs.model
    recorder(Progress(stage=STAGE, done=0, total=1 + REPEATS, message="opening the artifact"))
    dtype = str(model.dtype).removeprefix("torch.")
    opened = open_module(
        str(folder),
        model.kind,
        device=str(model.device),
        dtype=dtype,
        trust_remote_code=inputs.settings.model.trust_remote_code,
    )
    new = NEW_TOKENS if model.kind == "causal-lm" else 0
    prompt = min(PROMPT_TOKENS, (model.max_positions or PROMPT_TOKENS + new) - new)
    vocabulary = int(model.config.get_text_config().vocab_size)
    rows = draw_prompt(1, prompt, vocabulary, inputs.settings.calibration.seed)
    modules = {DENSE: model.module, COMPRESSED: opened}
    answers = _take_turns(modules, model.kind, rows, new, recorder)
    measured = [
        ModelSpeed(
            name=name,
            weight_bytes=count_weight_bytes(module),
            way=answers[name][0]["way"],
            figures=tuple(compute_speeds(answers[name], 1, prompt, new)),
        )
        for name, module in modules.items()
    ]
    stock = [ModelSpeed(name=STOCK, weight_bytes=stock_bytes)] if stock_bytes else []
    return SpeedReport(
        command=command,
        models=(*measured, *stock),
        prompt_tokens=prompt,
        new_tokens=new,
        threads=torch.get_num_threads(),
        device=str(model.device),
        dtype=dtype,
    )


def _take_turns(
    modules: dict[str, nn.Module],
    kind: Any,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    recorder: Recorder,
) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of `run_rows` per model; those of the first round are dropped."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in modules}
    begin = time.perf_counter()
    message = "the dense model and the artifact in turns"
    for done in range(1 + REPEATS):
        recorder(
            Progress(
                stage=STAGE,
                done=done,
                total=1 + REPEATS,
                message=message,
            )
        )
        for name, module in modules.items():
            answers[name].append(run_rows(module, kind, rows, new_tokens))
        if done and time.perf_counter() - begin > BUDGET_SECONDS:
            break
    recorder(Progress(stage=STAGE, done=1 + REPEATS, total=1 + REPEATS))
    return {name: found[1:] for name, found in answers.items()}
