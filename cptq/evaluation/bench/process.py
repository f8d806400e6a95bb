"""The process of `cptq bench` that runs one model, one request at a time.

    python -m cptq.evaluation.bench.process JOB

`JOB` is JSON: the engine's name under `engine`, the rest is passed to the engine. Requests are
lines of JSON on stdin, answers on stdout: `load`, then `run` any number of times, then `finish`.
Whatever a library prints goes to stderr. While it waits for a request it computes nothing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from cptq.evaluation.fresh_process import read_resident_bytes
from cptq.registry import Registry

Rows = Sequence[Sequence[int]]


class Engine(Protocol):
    """Runs one model. Its construction imports all that loading needs, and loads nothing."""

    def load(self) -> None:
        """Load the model."""

    def run(self, rows: Rows, new_tokens: int) -> dict[str, Any]:
        """Read rows of token ids of equal length; generate, where the model can.

        Returns `first_seconds` (to the first token, or to the output of the forward pass), and of a
        model that generates also `later_seconds` (the other new tokens) and `way`.
        """

    def read_device_bytes(self) -> dict[str, float]:
        """Read memory on a GPU: `loaded_device_bytes` now, `peak_device_bytes`; empty without."""


ENGINES: Registry[Any] = Registry(
    "engine",
    {
        "transformers": "cptq.evaluation.bench.with_transformers:TransformersEngine",
        "llama.cpp": "cptq.evaluation.bench.with_llama_cpp:LlamaCppEngine",
    },
)


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request; memory is in bytes, times are in seconds."""
    if request["do"] == "load":
        gc.collect()
        before, begin = read_resident_bytes("VmRSS"), time.perf_counter()
        engine.load()
        seconds = time.perf_counter() - begin
        gc.collect()
        after = read_resident_bytes("VmRSS")
        device = engine.read_device_bytes()
        return {"load_seconds": seconds, "import_bytes": before, "loaded_bytes": after, **device}
    if request["do"] == "run":
        return engine.run(request["rows"], request["new_tokens"])
    gc.collect()
    used, peak = read_resident_bytes("VmRSS"), read_resident_bytes("VmHWM")
    return {"used_bytes": used, "peak_bytes": peak, **engine.read_device_bytes()}


def main(job: dict[str, Any]) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Engine = ENGINES.get(job.pop("engine"))(**job)
    for line in sys.stdin:
        answers.write(json.dumps(answer(engine, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
