"""The reload check: load an artifact in a fresh process and compare it with the model in memory.

A fresh Python process without cptq loads the directory with transformers alone. No key may be
missing, unexpected or of another shape, and the output for a sample must be that of the compressed
model in memory. Two kinds of wrong directory (a Conv1D, experts of mixed bits) load without an
error and with random weights; only comparing outputs finds them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cptq.artifact import stock_load
from cptq.checkpoint.files import read_config
from cptq.checkpoint.loader import choose_auto_class
from cptq.errors import ArtifactError
from cptq.types import ModelKind

#: largest difference, as a share of the largest expected value, between two float32 runs of the
#: same weights (other kernels and other orders of summation; on one CPU it is 0)
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class ReloadSample:
    """Inputs, and the outputs of the compressed model in memory for them (float32).

    `tolerance` is relative to the largest expected value. `attention` is the implementation that
    the model in memory uses (None: transformers' default). Where `partial` is set, only the
    expected values that are numbers are known. `left_out` names the last blocks where they are not
    run: the outputs are then those of a model without them, and only `blocks` are loaded.
    """

    inputs: Mapping[str, Tensor]
    expected: Tensor
    tolerance: float = TOLERANCE
    attention: str | None = None
    trust_remote_code: bool = False
    partial: bool = False
    blocks: int | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReloadCheck:
    """Keys and outputs in the fresh process; difference None: it could not compute anything.

    `weight_bytes`: of its parameters and buffers after the forward pass; None: not counted, or of
    some blocks alone.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    max_abs_difference: float | None
    seconds: float
    weight_bytes: int | None = None


def reload_in_fresh_process(
    path: Path, kind: ModelKind, sample: ReloadSample, *, imports: Sequence[str] = ()
) -> ReloadCheck:
    """Load `path` in a fresh process and compare its outputs with the expected ones.

    Args:
        path: the artifact.
        kind: of model; names the auto class.
        sample: inputs, keyword arguments of the model's forward, and the logits, or the last hidden
            state of an encoder, that are expected.
        imports: modules that are imported before it is loaded; none means stock transformers.

    Raises:
        ArtifactError: it does not load, keys are missing, unexpected or mismatched, or the outputs
            differ; says which and by how much.
    """
    start, path = time.perf_counter(), path.resolve()
    with tempfile.TemporaryDirectory(prefix=f"{path.name}-check-", dir=path.parent) as folder:
        job: dict[str, Any] = {
            "directory": str(path),
            "auto_class": choose_auto_class(read_config(path), kind),
            "attention": sample.attention,
            "trust_remote_code": sample.trust_remote_code,
            "blocks": sample.blocks,
            "left_out": list(sample.left_out),
            "imports": list(imports),
            "threads": torch.get_num_threads(),
        } | {name: str(Path(folder) / name) for name in ("inputs", "answer", "report")}
        values = {name: x.detach().cpu().contiguous() for name, x in sample.inputs.items()}
        save_file(values, job["inputs"])
        report = _run(Path(folder), job)
        answer = load_file(job["answer"])["answer"]
    expected = sample.expected.detach().float().cpu()
    found = ReloadCheck(
        missing=tuple(report["missing"]),
        unexpected=tuple(report["unexpected"]),
        mismatched=tuple(report["mismatched"]),
        max_abs_difference=_measure_difference(answer, expected, sample.partial),
        seconds=time.perf_counter() - start,
        weight_bytes=None if sample.blocks else report["weight_bytes"],
    )
    _check(found, [] if imports else report["cptq"], sample.tolerance * _find_largest(expected))
    return found


def _run(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Start the process and read its report."""
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # -P: the script's own directory must not come before the packages
    done = subprocess.run(
        [sys.executable, "-P", str(stock_load.__file__), str(job_file)],
        cwd=folder,
        # exact: the packed format's kernels would round activations, the model in memory does not
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CPTQ_EXACT": "1"}
        # an input at its threshold may fall on either side of it
        | {"CPTQ_ACTIVATION_SPARSITY": "off"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ArtifactError(
            "stock transformers cannot load what was written: "
            + (lines[-1].strip() if lines else f"the process ended with {done.returncode}")
        )
    report: dict[str, Any] = json.loads(Path(job["report"]).read_text(encoding="utf-8"))
    return report


def _find_largest(expected: Tensor) -> float:
    return float(expected.nan_to_num(0.0).abs().max())


def _measure_difference(answer: Tensor, expected: Tensor, partial: bool = False) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not a number."""
    if answer.shape != expected.shape:
        return float("inf")
    known = ~expected.isnan() if partial else torch.ones_like(expected, dtype=torch.bool)
    difference = float((answer - expected)[known].abs().max())
    return difference if difference == difference else float("inf")


def _check(found: ReloadCheck, imported: list[str], allowed: float) -> None:
    for what in ("missing", "unexpected", "mismatched"):
        names: tuple[str, ...] = getattr(found, what)
        if names:
            raise ArtifactError(
                f"stock transformers finds {len(names)} {what} keys in what was written, first "
                f"{names[0]}"
            )
    if imported:
        raise ArtifactError(f"the check was not independent: {imported[0]} was imported in it")
    if found.max_abs_difference is None or not found.max_abs_difference <= allowed:
        raise ArtifactError(
            f"the written model answers differently from the one in memory: by "
            f"{found.max_abs_difference:.3g}, where {allowed:.3g} is allowed"
        )
