"""What the scripts that compress and evaluate share: run a cptq command, read what it found.

Seconds are processor time (user and system, all threads) of the whole command; memory is the
largest resident set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Of one command: processor seconds, and the peak of memory in GB."""

    seconds: float
    memory: float


def run(*words: object) -> Cost:
    """Run one cptq command in a process of its own."""
    line = [sys.executable, "-m", "cptq", *map(str, words)]
    print("$ cptq", *line[3:], file=sys.stderr, flush=True)
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"cptq {words[0]} failed")
    return Cost(seconds=used.ru_utime + used.ru_stime, memory=used.ru_maxrss / 1e6)


def read_metric(results: Path, name: str) -> float:
    """Return one metric of an eval.json."""
    found = json.loads(results.read_text())["evaluation"]
    return next(float(row["value"]) for row in found if row["metric"] == name)


def count_weight_bytes(artifact: Path) -> int:
    """Return the bytes of an artifact's weight files, as its manifest has them."""
    return sum(json.loads((artifact / "cptq.json").read_text())["weight_files"].values())
