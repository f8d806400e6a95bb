"""Replayed block by block, a model says what it says in one go, whatever its family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cptq.calibration.objective import choose_objective
from cptq.calibration.replay import BlockReplay, forward
from cptq.calibration.tokens import Batch
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, replace_weight
from tests.conftest import TinyModel
from tests.left_behind import list_replaced_forwards
from tests.quick import keep_quick
from tests.reference.sensitivity import loaded
from tests.tiny_models import BLOCKS, RECIPES, VARIED, VOCABULARY

LENGTHS = ((9, 4, 7), (3, 12))


def padded_batches(side: str = "right") -> list[Batch]:
    """Two batches of other shapes, each with padding in all rows but one."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths in LENGTHS:
        ids = torch.randint(5, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, slice(length) if side == "right" else slice(-length, None)] = 1
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def tensors(output: Any) -> list[Tensor]:
    """Everything that a model's output holds: logits, hidden state, pooled output."""
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def same(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def direct(model: LoadedModel, batch: Batch) -> Any:
    return forward(model, batch)


@pytest.fixture(scope="module", params=keep_quick(RECIPES, *VARIED))
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> LoadedModel:
    return loaded(tiny_model(request.param))


@pytest.mark.parametrize("side", ["right", "left"])
def test_block_by_block_equals_one_forward(model: LoadedModel, side: str) -> None:
    batches = padded_batches(side)
    replay = BlockReplay(model, batches)
    for index, batch in enumerate(batches):
        hidden = replay.embed(index)
        assert hidden.shape[:2] == batch["input_ids"].shape
        for block in range(BLOCKS):
            hidden = replay.run(block, hidden, index)
        with torch.no_grad():
            assert same(replay.finish(hidden, index), direct(model, batch))


def test_from_every_block_equals_one_forward(model: LoadedModel) -> None:
    batches = padded_batches()
    replay = BlockReplay(model, batches)
    for index, batch in enumerate(batches):
        hidden = replay.embed(index)
        for block in range(BLOCKS + 1):
            with torch.no_grad():
                assert same(replay.run_from(block, hidden, index), direct(model, batch)), block
            if block < BLOCKS:
                hidden = replay.run(block, hidden, index)


def test_logits_at_some_positions_are_those_of_all(model: LoadedModel) -> None:
    """Whether the family can leave out the others or not."""
    objective = choose_objective(model.kind, model.config)
    if objective.row != "token":
        pytest.skip("not judged token by token")
    batches = padded_batches()
    positions = [torch.arange(1, batch["input_ids"].shape[1], 3) for batch in batches]
    replay = BlockReplay(model, batches, positions)
    for index, batch in enumerate(batches):
        hidden = replay.run(0, replay.embed(index), index)
        with torch.no_grad():
            some = objective.select_rows(replay.run_from(1, hidden, index), batch, positions[index])
            every = direct(model, batch)
        mask = batch["attention_mask"][:, positions[index]].bool()
        assert torch.allclose(some, every.logits[:, positions[index]][mask], atol=1e-5)


def test_hidden_states_are_those_of_the_blocks(model: LoadedModel) -> None:
    """Against hooks on the blocks: what each is handed and what each gives."""
    batches = padded_batches()
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    handles = [block.register_forward_hook(look, with_kwargs=True) for block in model.blocks]
    direct(model, batches[1])
    for handle in handles:
        handle.remove()
    replay = BlockReplay(model, batches)
    assert torch.equal(replay.embed(1), seen[0][0])
    for block, (given, out) in enumerate(seen):
        assert torch.equal(replay.run(block, given, 1), out)


def test_padding_changes_nothing_for_what_is_real(model: LoadedModel) -> None:
    """The masks of the batch are those that the replayed blocks see."""
    batch = padded_batches()[0]
    alone = {name: value[1:2, : LENGTHS[0][1]] for name, value in batch.items()}
    replay = BlockReplay(model, [batch, alone])
    states = [replay.embed(0), replay.embed(1)]
    for block in range(BLOCKS):
        states = [replay.run(block, state, index) for index, state in enumerate(states)]
    torch.testing.assert_close(states[0][1, : LENGTHS[0][1]], states[1][0], rtol=1e-4, atol=1e-5)


def test_nothing_stays_behind(model: LoadedModel) -> None:
    batches = padded_batches()
    before = direct(model, batches[0])
    replay = BlockReplay(model, batches)
    hidden = replay.run(1, replay.run(0, replay.embed(0), 0), 0)
    replay.finish(hidden, 0)
    replay.run_from(1, hidden, 0)
    assert not list_replaced_forwards(model.module)
    assert same(direct(model, batches[0]), before)


def test_the_weights_of_the_moment_are_used(model: LoadedModel) -> None:
    batches = padded_batches()
    replay = BlockReplay(model, batches)
    hidden = replay.embed(0)
    before = replay.run(0, hidden, 0)
    spec = next(spec for spec in model.layers if spec.block == 0)
    part = model.linear(spec.name)
    with replace_weight(part, 0.5 * get_weight(part)):
        changed, whole = replay.run(0, hidden, 0), direct(model, batches[0])
        assert not torch.equal(changed, before)
        assert same(replay.run_from(0, hidden, 0), whole)
    assert torch.equal(replay.run(0, hidden, 0), before)


class Broken(Exception):
    """Raised in the middle of a block."""


def test_a_block_is_itself_again_after_an_error(tiny_model: TinyModel) -> None:
    model, batches = loaded(tiny_model("llama")), padded_batches()
    before, replay = direct(model, batches[0]), BlockReplay(model, batches)
    hidden = replay.embed(0)

    def fail(*_args: Any) -> None:
        raise Broken

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    for call in (
        lambda: replay.run(1, hidden, 0),
        lambda: replay.run_from(0, hidden, 0),
        lambda: replay.run_from(1, hidden, 0),
    ):
        with pytest.raises(Broken):
            call()
        assert not list_replaced_forwards(model.module)
    handle.remove()
    assert same(direct(model, batches[0]), before)


def test_a_forward_that_somebody_else_put_on_a_block_stays(tiny_model: TinyModel) -> None:
    """As accelerate does when it spreads a model over devices."""
    model, batches = loaded(tiny_model("llama")), padded_batches()
    calls: list[int] = []
    real = model.blocks[1].forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    model.blocks[1].forward = counting
    replay = BlockReplay(model, batches)
    replay.run(1, replay.run(0, replay.embed(0), 0), 0)
    assert model.blocks[1].forward is counting
    assert len(calls) == 1


def test_gradients_flow_from_a_hidden_state(tiny_model: TinyModel) -> None:
    model, batches = loaded(tiny_model("llama")), padded_batches()
    replay = BlockReplay(model, batches)
    hidden = replay.embed(0).requires_grad_()
    replay.run_from(1, hidden, 0).logits[0, :3].sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad[0].abs().max()) > 0
    assert float(hidden.grad[1:].abs().max()) == 0  # other rows
    assert float(hidden.grad[0, 3:].abs().max()) == 0  # later tokens


def test_only_the_wanted_block_runs(tiny_model: TinyModel) -> None:
    model, batches = loaded(tiny_model("llama")), padded_batches()
    replay, ran = BlockReplay(model, batches), []
    for index, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.linear("lm_head").register_forward_hook(lambda *_: ran.append("head"))
    hidden = replay.embed(0)
    assert ran == []
    replay.run(1, hidden, 0)
    assert ran == [1]
    replay.run_from(1, hidden, 0)
    assert ran == [1, 1, "head"]
    replay.finish(hidden, 0)
    assert ran == [1, 1, "head", "head"]
