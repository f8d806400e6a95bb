"""The stages of compress: each from frozen values to a frozen value, in any order that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from cptq.calibration.batches import Batch
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.pipeline.compress import compress_layers, make_plan, measure_sensitivity
from cptq.pipeline.inputs import CompressInputs, HeldOutText, load_inputs
from cptq.pipeline.recorder import Recorder
from tests.conftest import TinyModel

CALIBRATION = CalibrationSettings(calibration="pydoc", samples=4, seqlen=64, batch_size=2)


def recorder() -> Recorder:
    return Recorder(lambda event: None)


def load(model: Path, out: Path, **more: Any) -> CompressInputs:
    wanted: dict[str, Any] = {"calibration": CALIBRATION, "group_size": 16, "target": "3bit"}
    settings = CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted | more)
    return load_inputs(settings, recorder())


def rows_of(batches: Sequence[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}


def test_each_use_of_held_out_text_has_rows_of_its_own(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", refine=2)
    text = inputs.held_out
    parts = [rows_of(part) for part in (text.search, text.guard, text.judge)]
    parts.append(rows_of(inputs.calibration.batches))
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("more", "uses"),
    [
        ({}, {"judge"}),
        ({"check_uniform": False}, {"judge"}),
        ({"check_uniform": False, "refine": 2}, {"search", "guard", "judge"}),
        ({"allocator": "uniform"}, {"judge"}),
    ],
)
def test_text_is_held_out_for_what_uses_it(
    tiny_model: TinyModel, tmp_path: Path, more: dict[str, Any], uses: set[str]
) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", **more)
    names = HeldOutText.__dataclass_fields__
    assert {name for name in names if getattr(inputs.held_out, name)} == uses
    plain = "allocator" not in more and "check_uniform" not in more
    assert inputs.compare_with_baseline is plain


def test_a_plan_is_made_again_from_the_same_values(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out")
    before = {name: x.clone() for name, x in inputs.model.module.state_dict().items()}
    tables = measure_sensitivity(inputs, recorder())
    assert list(tables) == ["output"]
    assert inputs.tables == {}
    first, second = (make_plan(inputs, tables, recorder()) for _ in range(2))
    assert first == second
    assert first.predicted_bytes <= inputs.ledger.budget.limit_bytes
    for name, x in inputs.model.module.state_dict().items():
        assert torch.equal(x, before[name])
    compressed = compress_layers(inputs, first, recorder())
    packed = [unit for unit in inputs.model.units if not first.choices[unit.name].dense]
    assert len(compressed.layers) == sum(len(unit.layers) for unit in packed)
    with pytest.raises(FrozenInstanceError):
        compressed.plan = second  # type: ignore[misc]


def test_scores_that_no_plan_needs_are_not_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    inputs = load(tiny_model("llama"), tmp_path / "out", allocator="even")
    heard = recorder()
    assert measure_sensitivity(inputs, heard) == {}
    assert heard.timings == {}
    assert make_plan(inputs, {}, heard).metric is None
