"""Fresh Python processes to measure in: their environment, their memory, and how they end.

A peak of memory cannot be reset, and what the caller holds would count, so models are measured in
processes of their own. `Worker` is one that stays alive and answers requests, one line of JSON each
way, so that several can take turns. Needs no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cptq.errors import EvaluationError

_NO_MEMORY = ("memoryerror", "out of memory", "allocate memory", "bad_alloc")
_LACKS_MEMORY = "it ran out of memory"
_LONGEST_REASON = 300
#: seconds that an ended process may take to vanish
_PATIENCE = 10


def build_environment(threads: int | None = None) -> dict[str, str]:
    """Build the environment: this one, without the network and with this very cptq first.

    `threads` also bounds libraries that read OMP_NUM_THREADS.
    """
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    bound = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {
        **os.environ,
        **bound,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def read_resident_bytes(field: str) -> float:
    """Read the resident memory now (VmRSS) or at its peak (VmHWM), in bytes.

    From /proc, because `getrusage` of a child starts from its parent's peak on Linux; elsewhere
    `getrusage` gives the peak for both.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{field}:"))
        return float(line.split()[1]) * 1024
    import resource

    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def explain_end(code: int, messages: str) -> str:
    """Explain in a clause why a process ended, from its exit code and what it wrote to stderr.

    A negative code is the signal that killed it. Systems without memory left send SIGKILL.
    """
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    last = lines[-1][:_LONGEST_REASON] if lines else f"exit status {code}"
    if any(words in last.lower() for words in _NO_MEMORY):
        return _LACKS_MEMORY
    if code == -signal.SIGKILL:
        return "it was killed (SIGKILL), as systems do that have no memory left"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return last


class Worker:
    """A process that answers requests until it is closed; a context manager.

    Args:
        name: what it measures, for messages.
        module: run as `python -m module JOB`, the job as JSON.
        job: what it is told at its start.
        threads: see `build_environment`.
    """

    def __init__(
        self, name: str, module: str, job: Mapping[str, Any], threads: int | None = None
    ) -> None:
        self.name = name
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            env=build_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer to it.

        Raises:
            EvaluationError: the process has ended; says why.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._build_error()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _build_error(self) -> EvaluationError:
        code = self.process.wait(_PATIENCE)
        self.messages.seek(0)
        reason = explain_end(code, self.messages.read().decode(errors="replace"))
        lacks = "memory" in reason
        return EvaluationError(
            f"the process that runs {self.name} ended: {reason}",
            hint="try a smaller --batch-size, fewer models, or --dtype bfloat16" if lacks else None,
        )

    def close(self) -> None:
        """End the process, also in the middle of a request."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.messages):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request that it no longer read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
