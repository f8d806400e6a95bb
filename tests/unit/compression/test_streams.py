"""A pass that waits at each unit against a pass for every stage, and when it cannot be taken."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.spill import Spill
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import streams
from cptq.compression.streams import Moments, Stream
from tests.conftest import TinyModel
from tests.left_behind import list_left_behind
from tests.reference.sensitivity import loaded, random_calibration


def crush(model: LoadedModel, name: str) -> None:
    """Change a weight far enough for everything after it to differ."""
    set_weight(model.linear(name), get_weight(model.linear(name)).round(decimals=1))


def walk_blocks(
    model: LoadedModel, *, in_order: bool, judged: bool = False
) -> Iterator[tuple[str, Moments]]:
    """Walk all blocks unit by unit, changing each unit's weights as soon as it has been met."""
    batches = random_calibration(model, rows=5, length=21).batches
    stream = Stream(model, batches, dense=True)
    other = Stream(model, batches[:1]) if judged else None
    for block in range(len(model.blocks)):
        units = [unit for unit in model.units if unit.block == block]
        assert stream.enter_block(block, units)
        stages = [[unit] for unit in units]
        walk = stream.walk(block, stages, in_order=in_order)
        beside = other.walk(block, stages, in_order=in_order) if other else [{}] * len(stages)
        for unit, moments, _ in zip(units, walk, beside, strict=True):
            yield unit.name, moments[unit.name]
            for spec in unit.layers:
                crush(model, spec.name)


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and torch.equal(one, two)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt_neox", "bert", "mpnet"])
@pytest.mark.parametrize("judged", [False, True])
@torch.no_grad()
def test_waiting_passes_see_what_a_pass_per_unit_sees(
    arch: str, judged: bool, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model(arch))
    twin = copy.deepcopy(model)
    waiting = list(walk_blocks(model, in_order=True, judged=judged))
    repeated = list(walk_blocks(twin, in_order=False))
    assert [name for name, _ in waiting] == [name for name, _ in repeated]
    assert len(waiting) == len(model.units) > 2
    for (_, one), (_, two) in zip(waiting, repeated, strict=True):
        assert equal(one.H_II, two.H_II)
        assert equal(one.C_II, two.C_II)
    assert any(bool(one.C_II.any()) for _, one in waiting if one.C_II is not None)
    assert not list_left_behind(model.module)


@pytest.mark.parametrize("arch", ["llama", "bert"])
@torch.no_grad()
def test_inputs_on_disk_while_batches_wait_change_nothing(
    arch: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny_model(arch))
    parked: list[bool] = []
    park = Spill.park
    monkeypatch.setattr(Spill, "park", lambda self, x: parked.append(True) or park(self, x))
    monkeypatch.setattr(streams, "can_wait", lambda *_: True)
    short = replace(copy.deepcopy(model), spill=Spill(0, tmp_path))
    waiting = list(walk_blocks(short, in_order=True))
    assert parked
    repeated = list(walk_blocks(model, in_order=False))
    for (_, one), (_, two) in zip(waiting, repeated, strict=True):
        assert equal(one.H_II, two.H_II)
        assert equal(one.C_II, two.C_II)


@torch.no_grad()
def test_a_walk_runs_each_block_once_per_batch(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    calls: list[int] = []
    model.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    batches = random_calibration(model, rows=5, length=21).batches
    stream = Stream(model, batches)
    units = [unit for unit in model.units if unit.block == 1]
    list(stream.walk(1, [[unit] for unit in units], in_order=True))
    assert len(calls) == len(batches)


@torch.no_grad()
def test_what_is_called_twice_or_in_another_order_is_found_out(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    batches = random_calibration(model, rows=2, length=9).batches
    units = [unit for unit in model.units if unit.block == 0]
    assert Stream(model, batches, dense=True).enter_block(0, units)
    assert not Stream(model, batches, dense=True).enter_block(0, units[::-1])
    attention = model.blocks[0].self_attn
    once = attention.o_proj.forward
    attention.o_proj.forward = lambda x: once(x) + attention.q_proj(x)
    assert not Stream(model, batches, dense=True).enter_block(0, units)
