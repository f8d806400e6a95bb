"""The reload check of a GGUF file: llama.cpp in a fresh process computes the sample.

The file is also read back strictly and every tensor hashed (`compute_gguf_digests`). llama.cpp runs
only if llama-cpp-python is installed. It rounds activations to 8 bits before it multiplies them
with quantized weights, and to 16 for F16 and BF16, so outputs agree only to about a percent of the
largest although the weights are equal. `TOLERANCE` detects a wrong row order or scale, which change
outputs by as much as the outputs themselves, but not a wrong last bit; the bits are covered by the
tests of packing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cptq.artifact.gguf import llama_load
from cptq.artifact.gguf.header import read_gguf
from cptq.artifact.reload import ReloadCheck, ReloadSample
from cptq.errors import ArtifactError
from cptq.types import Emit, ModelKind, Notice

#: allowed root mean square of the difference, as a share of that of the expected values
TOLERANCE = 0.1
#: texts to tokenize with llama.cpp and with the tokenizer
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 2026, 3.14 was (still) about 22/7; wasn't it?\n\n  Indented, with   spaces",
    "Grüße aus Łódź, 東京 and 🙂",
)
_CHUNK = 1 << 22


def compute_gguf_digests(path: Path) -> dict[str, str]:
    """Return the sha256 (hex) of the stored bytes of every tensor, sorted by name."""
    digests = {}
    with path.open("rb") as stream:
        for tensor in read_gguf(path).tensors:
            stream.seek(tensor.start)
            digest, left = hashlib.sha256(), tensor.nbytes
            while left:
                chunk = stream.read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk)
            digests[tensor.name] = digest.hexdigest()
    return dict(sorted(digests.items()))


def reload_in_llama_cpp(
    path: Path, kind: ModelKind, sample: ReloadSample, emit: Emit, tokenizer: Path | None
) -> ReloadCheck:
    """Compute the sample in llama.cpp and compare; without llama.cpp, emit a warning.

    `tokenizer` is the tokenizer.json whose tokens llama.cpp should produce, if available.

    Raises:
        ArtifactError: the file does not load, or its outputs differ.
    """
    start = time.perf_counter()
    read_gguf(path)
    if importlib.util.find_spec("llama_cpp") is None:
        message = "llama-cpp-python is not installed: the file was read back but not run"
        emit(Notice(kind="warning", subject=path.name, message=message))
        return _make_reload_check(None, start)
    report, answer = _compute(path, kind, sample)
    if report["cptq"]:
        raise ArtifactError(f"the reload check imported {report['cptq'][0]}")
    if tokenizer is not None:
        _compare_tokens(tokenizer, report["tokens"], emit)
    expected = _select_expected(kind, sample)
    if answer.shape != expected.shape:
        raise ArtifactError(
            f"llama.cpp returns outputs of shape {tuple(answer.shape)}, not {tuple(expected.shape)}"
        )
    known = ~expected.isnan() if sample.partial else torch.ones_like(expected, dtype=torch.bool)
    _check_outputs(answer[known], expected[known])
    return _make_reload_check(float((answer - expected)[known].abs().max()), start)


def _make_reload_check(difference: float | None, start: float) -> ReloadCheck:
    seconds = time.perf_counter() - start
    return ReloadCheck(
        missing=(), unexpected=(), mismatched=(), max_abs_difference=difference, seconds=seconds
    )


def _select_expected(kind: ModelKind, sample: ReloadSample) -> Tensor:
    """Return one row per real token, or per text for a classifier."""
    expected = sample.expected.detach().float().cpu()
    if kind == "classifier":
        return expected
    kept = sample.inputs.get("attention_mask", torch.ones_like(sample.inputs["input_ids"]))
    return expected[kept.bool().cpu()]


def _compute(path: Path, kind: ModelKind, sample: ReloadSample) -> tuple[Mapping[str, Any], Tensor]:
    ids = sample.inputs["input_ids"]
    mask = sample.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    with tempfile.TemporaryDirectory(prefix="cptq-check-") as folder:
        job: dict[str, Any] = {
            "file": str(path.resolve()),
            "rows": [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)],
            "texts": TEXTS,
            "kind": kind,
            "threads": torch.get_num_threads(),
            "answer": str(Path(folder) / "answer.npy"),
            "report": str(Path(folder) / "report.json"),
        }
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_llama_cpp(Path(folder))
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        return report, torch.from_numpy(np.load(job["answer"]))


def _run_llama_cpp(folder: Path) -> None:
    # -P: the script's own directory must not come before the packages
    done = subprocess.run(
        [sys.executable, "-P", str(llama_load.__file__), str(folder / "job.json")],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "rror" in line]
        why = lines[0] if lines else f"the process ended with {done.returncode}"
        raise ArtifactError(f"llama.cpp cannot load the written file: {why}")


def _check_outputs(answer: Tensor, expected: Tensor) -> None:
    share = float((answer - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not share <= TOLERANCE:
        raise ArtifactError(
            f"llama.cpp's outputs differ from those of the model in memory by {share:.3g} of their "
            f"root mean square; {TOLERANCE:g} is allowed"
        )


def _compare_tokens(path: Path, found: list[list[int]], emit: Emit) -> None:
    """Emit a warning for each text that llama.cpp tokenizes differently."""
    tokenizer = Tokenizer.from_file(str(path))
    for text, ids in zip(TEXTS, found, strict=True):
        if ids != tokenizer.encode(text).ids:
            message = f"llama.cpp tokenizes {text[:24]!r}... differently from transformers"
            emit(Notice(kind="warning", subject="tokenizer", message=message))
