"""Numbers gone wrong are named by a run that holds one block at a time as by one in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cptq
from cptq.errors import CptqError
from cptq.types import Event, Notice
from tests.conftest import TinyModel
from tests.integration.forks import TEXT
from tests.integration.test_little_memory import sha256_of, starve
from tests.unit.checkpoint.made import edit_weights

pytestmark = pytest.mark.usefixtures("short_manual", "same_process")
Weights = dict[str, Tensor]


def put_nan(weights: Weights) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 2] = torch.nan


def overflow(weights: Weights) -> None:
    for name in ("up_proj", "gate_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e30


def silence_input(weights: Weights) -> None:
    """What three linears of the second block read is 0 in one column."""
    weights["model.layers.1.input_layernorm.weight"][2] = 0


def leave(weights: Weights) -> None: ...


def silence_router(weights: Weights) -> None:
    """All experts are equally likely, so that the same ones take every token."""
    for name in weights:
        if name.endswith("mlp.gate.weight"):
            weights[name].zero_()


#: defect -> architecture, how it comes about, options, and what is said of it
DEFECTS: Mapping[str, tuple[str, Callable[[Weights], object], dict[str, Any], str]] = {
    "NaN": ("llama", put_nan, {}, "model.layers.1.mlp.down_proj.weight holds NaN"),
    "infinity": ("llama", overflow, {}, "inputs of model.layers.0.mlp.down_proj are NaN or inf"),
    "dead input": ("llama", silence_input, {}, ""),
    "rank": ("llama", leave, {"samples": 3, "seqlen": 8}, ""),
    "unreached": ("qwen3_moe", silence_router, {}, "no calibration token reaches it: rounded to"),
}
#: what an analysis says where a compress says something else
OF_ANALYSIS = {
    "infinity": "the inputs of the output head are NaN or infinite",
    "unreached": "mlp.experts.0.gate_up: no sampled token reaches it: metrics that sample tokens",
}
#: without scores, so that the compression itself meets the defect
BLIND = {"target": "4bit", "check_uniform": False, "allocator": "uniform"}
OUTPUT = {"metrics": ("output", "pruning", "taylor-quantized"), "bits": (4, 16)}


def run(
    command: Callable[..., object], model: Path, out: Path, options: dict[str, Any]
) -> tuple[dict[str, str] | str, set[str]]:
    """Return the digests of what was written, or the error, and all notices but those on memory."""
    events: list[Event] = []
    text = {"calibration": str(model.parent / "text.txt"), "batch_size": 2, "group_size": 16}
    usual = {"samples": 4, "seqlen": 32}
    try:
        command(str(model), out=out, progress=events.append, **text, **usual | options)
    except CptqError as error:
        return str(error), set()
    said = {f"{e.subject}: {e.message}" for e in events if isinstance(e, Notice)}
    return sha256_of(out), {words for words in said if " memory" not in words}


def compare(
    command: Callable[..., object],
    defect: str,
    options: dict[str, Any],
    tiny_model: TinyModel,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, str]:
    """Run in memory and without any; return all that was said, and what should be."""
    arch, edit, more, told = DEFECTS[defect]
    (place / "text.txt").write_text(TEXT)
    model = edit_weights(Path(shutil.copytree(tiny_model(arch), place / "model")), edit)
    found, said = run(command, model, place / "whole", options | more)
    starve(monkeypatch)
    assert run(command, model, place / "small", options | more) == (found, said)
    assert isinstance(found, str) == (defect in ("NaN", "infinity"))
    return " ".join([str(found), *said]), told


@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(
            defect,
            marks=[pytest.mark.slow] if defect in ("dead input", "rank", "unreached") else [],
        )
        for defect in DEFECTS
    ],
)
def test_a_compress_names_it(
    defect: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = compare(cptq.compress, defect, BLIND, tiny_model, tmp_path, monkeypatch)
    assert told in said


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_an_analysis_names_it(
    defect: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = compare(cptq.analyze, defect, OUTPUT, tiny_model, tmp_path, monkeypatch)
    assert OF_ANALYSIS.get(defect, told) in said
