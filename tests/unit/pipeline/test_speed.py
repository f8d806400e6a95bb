"""What `compress` measures of speed and memory at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cptq.pipeline import speed
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.recorder import Recorder
from cptq.types import Notice, SpeedReport
from tests.conftest import Heard, TinyModel
from tests.unit.pipeline.test_stages import load

pytestmark = pytest.mark.usefixtures("short_manual")


@pytest.fixture(scope="module")
def inputs(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory, short_manual: None
) -> CompressInputs:
    return load(tiny_model("llama"), tmp_path_factory.mktemp("speed") / "an out")


def measure(inputs: CompressInputs, folder: Path, heard: Heard, **more: Any) -> SpeedReport:
    settings = replace(inputs.settings, **more)
    return speed.measure_speed(replace(inputs, settings=settings), folder, 321, Recorder(heard))


def test_shared_tensors_count_once() -> None:
    module = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.Linear(5, 3))
    module[1].weight = module[0].weight
    module.register_buffer("mask", torch.zeros(11, dtype=torch.bool))
    assert speed.count_weight_bytes(module) == 4 * (7 * 5 + 5 * 3 + 3) + 11


def test_both_models_are_measured_in_turns(inputs: CompressInputs, heard: Heard) -> None:
    found = measure(inputs, inputs.model.path, heard)  # in the artifact's place
    dense, compressed, stock = found.models
    assert dense.weight_bytes == compressed.weight_bytes
    assert dense.weight_bytes >= 4 * inputs.model.parameters
    assert (stock.weight_bytes, stock.way, stock.figures) == (321, "", ())
    for model in (dense, compressed):
        assert [figure.name for figure in model.figures] == ["prefill", "decode"]
        assert {len(figure.values) for figure in model.figures} == {speed.REPEATS}
        assert all(value > 0 for figure in model.figures for value in figure.values)
    assert found.command == f"cptq bench {inputs.model.source} '{inputs.out}'"
    assert heard.stages == {"speed"}
    assert not heard.notices


def test_it_ends_once_the_time_is_over(
    inputs: CompressInputs, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "BUDGET_SECONDS", 0.0)
    found = measure(inputs, inputs.model.path, heard)
    assert [len(figure.values) for figure in found.models[0].figures] == [1, 1]


def test_what_cannot_be_opened_is_a_notice(
    inputs: CompressInputs, heard: Heard, tmp_path: Path
) -> None:
    found = measure(inputs, tmp_path, heard)
    assert found.models == ()
    (notice,) = [event for event in heard if isinstance(event, Notice)]
    assert (notice.kind, notice.subject) == ("skipped", "speed")
    assert found.command in notice.message
    assert found.why in notice.message


def test_it_is_left_out_with_no_eval(inputs: CompressInputs, heard: Heard) -> None:
    found = measure(inputs, inputs.model.path, heard, evaluate=False)
    assert (found.models, found.why, list(heard)) == ((), "--no-eval", [])


def test_an_encoder_computes_forward_passes(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    bert = load(tiny_model("bert"), tmp_path / "out")
    found = measure(bert, bert.model.path, heard)
    assert [figure.name for figure in found.models[0].figures] == ["forward"]
    assert found.new_tokens == 0
