"""Experts taken apart compute what the stack computes, and all of them are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cptq.calibration.replay import forward
from cptq.checkpoint.experts import UnstackedExperts, unstack_experts
from cptq.checkpoint.files import read_tensor_specs
from cptq.checkpoint.loader import load_model
from cptq.checkpoint.model import LoadedModel
from cptq.config import ModelSettings
from tests.conftest import TinyModel
from tests.families import build_family

MIXTURES = ("qwen2_moe", "qwen3_moe", "olmoe")


def opened(path: Path, *, experts: bool) -> LoadedModel:
    return load_model(ModelSettings(model=str(path)), lambda _: None, experts=experts)


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_model_computes_the_same(arch: str, tiny_model: TinyModel) -> None:
    path = tiny_model(arch)
    stock, apart = (opened(path, experts=flag) for flag in (False, True))
    ids = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = (forward(model, {"input_ids": ids}).logits for model in (stock, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", MIXTURES)
def test_every_expert_is_a_unit_under_the_names_of_the_checkpoint(
    arch: str, tiny_model: TinyModel
) -> None:
    """Also those that the few tokens of the trace are not routed to."""
    path = tiny_model(arch)
    model = opened(path, experts=True)
    stored = read_tensor_specs(path)
    experts = [layer for layer in model.layers if layer.expert]
    assert len(experts) == 2 * 6 * 3
    assert all(layer.compressible for layer in experts)
    assert {layer.weight_name for layer in experts} <= set(stored)
    assert {spec.name for spec in model.tensors} == set(stored)
    names = [unit.name for unit in model.units]
    assert "model.layers.1.mlp.experts.5.gate_up" in names
    assert "model.layers.1.mlp.experts.5.down_proj" in names
    blocks = [unit.block for unit in model.units]
    assert blocks == sorted(blocks)


def test_experts_are_named_as_transformers_stacks_them(tmp_path: Path) -> None:
    """Mixtral's linears are w1, w3 and w2 in checkpoints; the name of its blocks is another."""
    path = build_family(tmp_path / "model", "mixtral")
    stock, apart = (opened(path, experts=flag) for flag in (False, True))
    names = {spec.name.rpartition(".")[2] for spec in apart.layers if spec.expert}
    assert names == {"w1", "w2", "w3"}
    assert {spec.role for spec in apart.layers if spec.expert} == {"gate", "up", "down"}
    ids = torch.arange(3, 24)[None]
    with torch.no_grad():
        theirs, ours = (forward(model, {"input_ids": ids}).logits for model in (stock, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_being_asked_nothing_is_taken_apart(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("qwen3_moe"), experts=False)
    assert not any(isinstance(part, UnstackedExperts) for part in model.module.modules())


def test_the_weights_are_those_of_the_stack(tiny_model: TinyModel) -> None:
    """No copy: what changes an expert's weight changes the stack's memory."""
    stock = opened(tiny_model("qwen3_moe"), experts=False).module.model.layers[0].mlp.experts
    apart = UnstackedExperts(stock)
    apart.get_submodule("3.up_proj").weight.fill_(7.0)
    assert bool((stock.gate_up_proj[3, 32:] == 7.0).all())
    assert not bool((stock.gate_up_proj[3, :32] == 7.0).any())


class Stack(nn.Module):
    """The form that is known, and a limit that is not."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5, generator=draw))
        self.down_proj = nn.Parameter(torch.randn(3, 5, 4, generator=draw))
        self.act_fn, self.limit = nn.functional.silu, limit

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        rows = []
        for token, row in enumerate(x):
            each = torch.zeros(5)
            for index, share in zip(chosen[token], weight[token], strict=True):
                gate, up = (self.gate_up_proj[index] @ row).chunk(2)
                inner = self.act_fn(gate) * up
                if self.limit is not None:
                    inner = inner.clamp(-self.limit, self.limit)
                each = each + share * (self.down_proj[index] @ inner)
            rows.append(each)
        return torch.stack(rows)


@pytest.mark.parametrize(("limit", "apart"), [(None, True), (0.1, False)])
def test_a_stack_that_computes_otherwise_stays(limit: float | None, apart: bool) -> None:
    model = nn.Module()
    model.experts = Stack(limit)
    unstack_experts(
        model, [f"experts.0.{end}.weight" for end in ("gate_proj", "up_proj", "down_proj")]
    )
    assert isinstance(model.experts, UnstackedExperts) is apart


def test_a_stack_that_is_stored_as_one_stays() -> None:
    model = nn.Module()
    model.experts = Stack(None)
    unstack_experts(model, ["experts.gate_up_proj", "experts.down_proj"])
    assert isinstance(model.experts, Stack)
