"""What a checkpoint costs: bytes on disk, seconds to load, memory, tokens per second.

Bytes are those of the weight files alone (a tokenizer is often larger than what was saved). The
rest is measured by `cptq.evaluation.footprint_process` in a fresh process, on the directory the
model was loaded from, with its device and type and this process's number of threads. Speeds are
repeated and have a standard error. Bytes are exact, and loading and memory are measured once: those
have none, and their notes say why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cptq.checkpoint.files import find_weight_files
from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.errors import EvaluationError
from cptq.evaluation.fresh_process import build_environment, explain_end
from cptq.evaluation.task import EvalOptions
from cptq.types import Emit, EvalResult, Progress

VERSION = 1
TIMEOUT_SECONDS = 900
#: the process's name -> (task, metric, unit, higher is better), in the order of the results
MEASURES: Mapping[str, tuple[str, str, str, bool]] = {
    "load_seconds": ("load", "seconds", "seconds", False),
    "first_output_seconds": ("load", "seconds_to_first_output", "seconds", False),
    "peak_bytes": ("memory", "peak_resident", "bytes", False),
    "model_bytes": ("memory", "peak_above_imports", "bytes", False),
    "peak_device_bytes": ("memory", "peak_on_device", "bytes", False),
    "decode_tokens_per_second": ("speed", "decode", "tokens per second", True),
    "prefill_tokens_per_second": ("speed", "prefill", "tokens per second", True),
    "tokens_per_second": ("speed", "forward", "tokens per second", True),
    "rows_per_second": ("speed", "forward_rows", "rows per second", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedFootprint:
    """The task `footprint`, which reads no data: a random prompt does."""

    name: str
    fingerprint: None = None

    @property
    def documents(self) -> Mapping[str, Sequence[str]]:
        """Nothing."""
        return {}

    def measure(self, model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
        """Measure as `measure_footprint`."""
        return measure_footprint(model, options, emit)


def prepare_footprint(
    spec: ModelSpec, name: str, options: EvalOptions, emit: Emit
) -> PreparedFootprint:
    """Prepare the task: there is nothing to read."""
    return PreparedFootprint(name=name)


def measure_footprint(model: LoadedModel, options: EvalOptions, emit: Emit) -> list[EvalResult]:
    """Measure the results called `size`, `load`, `memory` and `speed`.

    Raises:
        EvaluationError: the fresh process failed; the message holds its last line.
    """
    emit(Progress(stage="footprint", done=0, total=1, message="a fresh process loads the model"))
    begin = time.perf_counter()
    size = _build_result("size", "weight_bytes", "bytes", False, count_weight_bytes(model.path))
    found = _run_process(model, options)
    seconds = time.perf_counter() - begin
    found["model_bytes"] = found["peak_bytes"] - found["import_bytes"]
    repeats = int(found["repeats"])
    measured = [
        replace(
            _build_result(task, metric, unit, higher, found[key]),
            stderr=found.get(f"{key}_stderr"),
            samples=repeats if task == "speed" else 1,
            seconds=seconds,
            notes=(_describe_conditions(model), *_explain_error(f"{key}_stderr" in found)),
        )
        for key, (task, metric, unit, higher) in MEASURES.items()
        if key in found
    ]
    emit(Progress(stage="footprint", done=1, total=1))
    return [replace(size, notes=("no standard error: counted, not measured",)), *measured]


def _explain_error(repeated: bool) -> tuple[str, ...]:
    return () if repeated else ("no standard error: measured once",)


def count_weight_bytes(path: Path) -> int:
    """Count the bytes of the weight files: safetensors, else the pickled ones."""
    files = find_weight_files(path) or sorted(path.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)


def _describe_conditions(model: LoadedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.device}, {dtype}, {torch.get_num_threads()} threads, stock transformers"


def _build_result(task: str, metric: str, unit: str, higher: bool, value: float) -> EvalResult:
    return EvalResult(
        task=task,
        version=VERSION,
        metric=metric,
        value=value,
        unit=unit,
        higher_is_better=higher,
        samples=1,
        seconds=0.0,
    )


def _run_process(model: LoadedModel, options: EvalOptions) -> dict[str, float]:
    command = [sys.executable, "-m", "cptq.evaluation.footprint_process", str(model.path)]
    command += ["--kind", model.kind, "--device", str(model.device)]
    command += ["--dtype", str(model.dtype).removeprefix("torch.")]
    command += ["--batch-size", str(options.batch_size), "--seed", str(options.seed)]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--trust-remote-code"] if options.trust_remote_code else []
    try:
        done = subprocess.run(
            command,
            env=build_environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        reason = explain_end(error.returncode, error.stderr)
        raise EvaluationError(f"a fresh process cannot run {model.path}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise EvaluationError(
            f"a fresh process did not load and run {model.path} in {TIMEOUT_SECONDS} s"
        ) from error
    numbers: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers
