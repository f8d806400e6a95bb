"""Forward and back block by block, against autograd through the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cptq.calibration.block_chain import BlockChain, find_unit_blocks
from cptq.calibration.objective import choose_objective
from cptq.calibration.replay import BlockReplay
from cptq.checkpoint.model import LoadedModel
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded, random_calibration


def walk(model: LoadedModel, weights: dict[int, list[Tensor]]) -> dict[int, list[Tensor | None]]:
    """Go forward and back with a sum over the output rows; return gradients by `weights`."""
    batches = random_calibration(model, rows=7, length=17).batches
    objective = choose_objective(model.kind, model.config)
    chain = BlockChain(model, batches)

    def judge(batch: int, output: Any, _positions: Tensor | None) -> tuple[Tensor, Tensor]:
        z_RV = objective.select_rows(output, batches[batch])
        return z_RV, torch.ones_like(z_RV).cumsum(1)

    chain.embed()
    for block in range(chain.blocks):
        assert len(list(chain.forward_block(block, keep=True))) == len(batches)
    chain.turn_around(judge)
    return {b: chain.backward_block(b, weights[b]) for b in reversed(range(chain.blocks))}


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "bert", "bert-encoder", "mpnet"])
def test_gradients_of_all_weights_of_all_blocks(arch: str, tiny_model: TinyModel) -> None:
    """Norms and biases as well, summed over batches."""
    model = loaded(tiny_model(arch))
    model.module.requires_grad_(True)
    weights = {index: list(block.parameters()) for index, block in enumerate(model.blocks)}
    found = walk(model, weights)
    assert all(p.grad is None for p in model.module.parameters())  # no trace is left
    batches = random_calibration(model, rows=7, length=17).batches
    objective = choose_objective(model.kind, model.config)
    replay = BlockReplay(model, batches)
    for index, batch in enumerate(batches):
        z_RV = objective.select_rows(replay.run_from(0, replay.embed(index), index), batch)
        z_RV.backward(torch.ones_like(z_RV).cumsum(1))
    for block, parameters in weights.items():
        for parameter, ours in zip(parameters, found[block], strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_weight_that_nothing_flows_through_has_no_gradient(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    idle = torch.ones(3, requires_grad=True)
    assert walk(model, {0: [idle], 1: []}) == {1: [], 0: [None]}


def test_where_units_lie(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    assert find_unit_blocks(model) == [[unit.block] for unit in model.units]
    first, second = (block.mlp.up_proj for block in model.blocks)
    second.weight = first.weight
    shared = [i for i, unit in enumerate(model.units) if "up_proj" in unit.layers[-1].name]
    found = find_unit_blocks(model)
    assert found[shared[0]] == [0, 1]
    assert [found[i] for i in range(len(found)) if i not in shared] == [
        [unit.block] for i, unit in enumerate(model.units) if i not in shared
    ]
