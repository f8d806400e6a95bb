"""Families whose blocks are no chain, run as one block: outputs and gradients of plain passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cptq.calibration.block_chain import BlockChain
from cptq.calibration.objective import choose_objective
from cptq.calibration.replay import BlockReplay, forward
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from tests.conftest import Heard
from tests.families import build_family
from tests.reference.sensitivity import random_calibration

#: family -> the part that is run as a whole
WHOLE = {
    "xlm": "transformer",
    "gemma3n_text": "model",
    "funnel": "funnel.encoder",
    "albert": "albert.encoder",
    "t5": "encoder",
}
QUICK = ("xlm",)


def mark(families: list[str]) -> list[object]:
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families
    ]


def load(path: Path, family: str, heard: Heard) -> LoadedModel:
    settings = ModelSettings(model=str(build_family(path / family, family)), device="cpu")
    return load_model(settings, heard)


@pytest.mark.parametrize("family", mark(list(WHOLE)))
def test_outputs_and_gradients_are_those_of_a_plain_pass(
    tmp_path: Path, heard: Heard, family: str
) -> None:
    model = load(tmp_path, family, heard)
    assert model.block_names == (WHOLE[family],)
    assert sum("are not a chain" in message for message in heard.notices) == 1
    batches = random_calibration(model, rows=7, length=17).batches
    objective = choose_objective(model.kind, model.config)
    replay = BlockReplay(model, batches)
    for index, batch in enumerate(batches):
        own = replay.finish(replay.run(0, replay.embed(index), index), index)
        rows = [objective.select_rows(out, batch) for out in (own, forward(model, batch))]
        torch.testing.assert_close(*rows)
    layers = [model.linear(spec.name) for unit in model.units for spec in unit.layers]
    weights = [layer.weight.requires_grad_() for layer in layers]
    chain = BlockChain(model, batches)
    chain.embed()
    assert len(list(chain.forward_block(0, keep=True))) == len(batches)

    def judge(
        batch: int, output: object, _positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z_RV = objective.select_rows(output, batches[batch])
        return z_RV, torch.ones_like(z_RV).cumsum(1)

    chain.turn_around(judge)
    found = chain.backward_block(0, weights)
    for batch in batches:
        z_RV = objective.select_rows(forward(model, batch), batch)
        z_RV.backward(torch.ones_like(z_RV).cumsum(1))
    for weight, ours in zip(weights, found, strict=True):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["openai-gpt", "xlnet"])
def test_blocks_that_return_lists_or_two_streams_are_a_chain(
    tmp_path: Path, heard: Heard, family: str
) -> None:
    model = load(tmp_path, family, heard)
    assert len(model.block_names) == 3
    (batch, *_) = random_calibration(model, rows=3, length=17).batches
    replay = BlockReplay(model, [batch])
    hidden = replay.embed(0)
    for block in range(3):
        hidden = replay.run(block, hidden, 0)
    plain = forward(model, batch).logits
    assert torch.equal(replay.finish(hidden, 0).logits, plain)
