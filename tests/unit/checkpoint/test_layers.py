"""Models that are out of the ordinary: what is kept dense and why, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from cptq.checkpoint.architectures import ARCHITECTURES, GENERIC
from cptq.checkpoint.inventory import Inventory, find_blocks, find_ties, take_inventory
from cptq.errors import ModelError
from cptq.types import Event, LayerSpec, Notice, TensorSpec
from tests.unit.checkpoint.made import load

WIDTH = 6


class Block(nn.Module):
    """`first` and `second` read the same input, `third` what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.idle = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.third(torch.tanh(self.first(x) * self.second(x)))


class Toy(nn.Module):
    """Embedding, blocks run in `order`, head."""

    def __init__(self, order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 20)
        self.order = order

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        for index in self.order:
            x = self.blocks[index](x)
        return self.head(x)


def inventory(model: nn.Module, events: list[Event] | None = None) -> Inventory:
    tensors = {
        name: TensorSpec(name=name, dtype="F32", shape=tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    return take_inventory(
        model.eval(), GENERIC, tensors, (events if events is not None else []).append
    )


def by_name(found: Inventory) -> dict[str, LayerSpec]:
    return {spec.name: spec for spec in found.layers}


def test_linears_that_are_handed_the_same_tensor_are_one_decision() -> None:
    found = inventory(Toy())
    assert found.block_names == ("blocks.0", "blocks.1")
    assert [unit.name for unit in found.units] == [
        "blocks.0.first+second",
        "blocks.0.third",
        "blocks.1.first+second",
        "blocks.1.third",
    ]
    assert found.units[0].numel == 2 * WIDTH * WIDTH


def test_equal_inputs_that_are_not_the_same_tensor_are_not_fused() -> None:
    model = Toy()
    for block in model.blocks:
        block.first.register_forward_pre_hook(lambda _module, args: (args[0].clone(),))
    names = [unit.name for unit in inventory(model).units]
    assert names[:2] == ["blocks.0.first", "blocks.0.second"]


def test_a_linear_that_never_runs_comes_last_and_dense() -> None:
    events: list[Event] = []
    found = inventory(Toy(), events)
    assert [spec.name for spec in found.layers][-2:] == ["blocks.0.idle", "blocks.1.idle"]
    assert "never runs" in str(by_name(found)["blocks.0.idle"].reason)
    told = [e for e in events if isinstance(e, Notice) and "never runs" in e.message]
    assert [(n.kind, n.subject) for n in told] == [("skipped", "blocks.0.idle, blocks.1.idle")]


def test_linears_outside_the_blocks_are_dense() -> None:
    spec = by_name(inventory(Toy()))["head"]
    assert spec.block is None
    assert not spec.compressible
    assert "outside the blocks" in str(spec.reason)


def test_linears_that_share_a_weight_are_dense() -> None:
    model = Toy()
    model.blocks[1].third.weight = model.blocks[0].third.weight
    assert find_ties(model) == {"blocks.1.third.weight": "blocks.0.third.weight"}
    specs = by_name(inventory(model))
    assert specs["blocks.1.third"].tied_to == "blocks.0.third"
    assert "shares its weight" in str(specs["blocks.1.third"].reason)


def test_a_block_that_runs_twice_is_dense() -> None:
    events: list[Event] = []
    found = inventory(Toy(order=(0, 1, 0)), events)
    assert {unit.block for unit in found.units} == {1}
    assert "more than once" in str(by_name(found)["blocks.0.third"].reason)
    assert any("more than once" in e.message for e in events if isinstance(e, Notice))


def test_a_matrix_in_no_linear_is_told() -> None:
    model, events = Toy(), []
    model.blocks[0].experts = nn.Parameter(torch.zeros(2, WIDTH, WIDTH))
    inventory(model, events)
    told = [e for e in events if isinstance(e, Notice) and e.subject == "blocks.0.experts"]
    assert [n.message for n in told] == ["in no linear layer; kept dense"]


def test_the_trace_leaves_no_hook() -> None:
    model = Toy()
    inventory(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_failing_trace_leaves_no_hook_either() -> None:
    model = Toy(order=(0, 7))
    with pytest.raises(ModelError, match="does not run on plain token ids"):
        inventory(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_no_stack_of_equal_blocks() -> None:
    model = nn.Sequential(nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ModelError, match="no stack of equal blocks"):
        find_blocks(model, GENERIC)
    mixed = nn.Module()
    mixed.parts = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    with pytest.raises(ModelError, match="no stack of equal blocks"):
        find_blocks(mixed, GENERIC)


def test_the_longest_stack_of_equal_modules_is_the_blocks() -> None:
    model = Toy()
    model.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.deep = nn.Module()
    model.deep.stack = nn.ModuleList(Block() for _ in range(3))
    assert find_blocks(model, GENERIC) == ("deep.stack.0", "deep.stack.1", "deep.stack.2")


def test_a_known_family_says_where_its_blocks_are() -> None:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(Block() for _ in range(2))
    model.model.longer = nn.ModuleList(Block() for _ in range(5))
    assert find_blocks(model, ARCHITECTURES["llama"]) == ("model.layers.0", "model.layers.1")


def test_a_model_of_pictures_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not run on plain token ids") as caught:
        load(tmp_path)
    assert "text models" in str(caught.value.allowed)
