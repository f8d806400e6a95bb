"""Processes of `cptq` that can be killed, without the seconds that importing torch takes.

    python -m tests.integration.forks

A server imports what `cptq compress` needs and forks for every command line that it is sent, one
JSON document per line each way. The reload check is that of `same_process`, speed is not measured,
and --tune makes few steps. Threads do not survive a fork: a server of several has run nothing
before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_models import SENTENCES, build_tiny_model

#: steps of --tune
FEW = 16
#: calibration text
TEXT = "".join(f"{i} {SENTENCES[i % len(SENTENCES)]}\n" for i in range(160))
REPOSITORY = Path(__file__).resolve().parents[2]


#: the environment variable that names where a run's directory is kept, see `_keep_run`
KEEP = "CPTQ_TEST_KEEP_RUN"


class Forks:
    """The server, from the side of a test."""

    def __init__(self, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.forks"],
            cwd=REPOSITORY,
            env=os.environ | {"TQDM_DISABLE": "1"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, words: list[str], log: Path, **environment: str) -> int:
        """Start `cptq WORDS`, whose output goes to `log`; return the process id."""
        return int(self._ask({"words": words, "log": str(log), "environment": environment}))

    def wait(self, pid: int) -> int:
        """Return the exit code, negative where a signal killed it."""
        return int(self._ask({"wait": pid}))

    def run(self, words: list[str], log: Path) -> int:
        """Run `cptq WORDS` to its end."""
        return self.wait(self.start(words, log))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self.process.communicate()


def place_text_beside(model: Path) -> Path:
    """Write the text that calibrates beside a model, as `text.txt`; return the model."""
    (model.parent / "text.txt").write_text(TEXT)
    return model


def _serve() -> None:
    import torch

    from cptq.api import compress
    from cptq.artifact import reload
    from cptq.pipeline import speed, tune
    from cptq.types import SpeedReport
    from tests.unit.artifact.same_process import run_here

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tune.STEPS = FEW  # type: ignore[attr-defined]
    reload._run = run_here  # type: ignore[assignment]
    unmeasured = SpeedReport(command="", why="in a test")
    speed._measure = lambda *_: unmeasured  # type: ignore[assignment]
    if torch.get_num_threads() == 1:
        _warm_up(compress)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if not pid:
            os.environ.update(request["environment"])
            _become_cptq(request["words"], request["log"])
        print(pid, flush=True)


def _warm_up(compress: Callable[..., Any]) -> None:
    """Let everything be imported that a run imports, without a gradient, which bars forking."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "text.txt", Path(folder) / "out"
        text.write_text(TEXT)
        model = build_tiny_model(Path(folder) / "model", "llama")
        compress(
            model, calibration=text, seqlen=64, out=out, metric="pq-index", progress=lambda e: None
        )


def _keep_run(place: Path) -> None:
    """Copy the run directory right before it is removed at the end."""
    from cptq.pipeline import run_directory

    remove = run_directory._remove_all

    def keep(run: run_directory.RunDirectory, made: list[Path]) -> None:
        shutil.copytree(run.path, place)
        remove(run, made)

    run_directory._remove_all = keep


def _become_cptq(words: list[str], log: str) -> None:
    from cptq.cli.app import main

    if KEEP in os.environ:
        _keep_run(Path(os.environ[KEEP]))
    # whoever started the tests may ignore some (nohup, the background of a shell)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = ["cptq", *words]
    code = 70
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
