"""Packed modules under torch.compile: the tracer does not look into them, and nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cptq.inference import compiled
from cptq.inference.modules import PackedEmbedding, PackedLinear
from cptq.inference.quantizer import CptqConfig, CptqQuantizer
from tests.unit.inference.native_weights import make_weight


class Model(nn.Module):
    """An embedding and a linear, packed."""

    def __init__(self) -> None:
        super().__init__()
        weight = make_weight(9, 64, bits=4, group=32)
        self.embedding = PackedEmbedding((9, 64), weight.scheme)
        self.linear = PackedLinear((9, 64), weight.scheme, bias=True)
        for module in (self.embedding, self.linear):
            module.weight.data, module.weight_scale.data = weight.codes, weight.scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids).relu()).sigmoid()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same() -> None:
    model, ids = Model(), torch.tensor([[1, 8, 3]])
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        fast = torch.compile(model, backend=keep, fullgraph=True)
        assert torch.equal(fast(ids), model(ids))
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert {"cptq.linear.default", "cptq.embedding.default"} <= called


def test_operators_say_the_shape_and_type_of_what_they_give() -> None:
    model = Model()
    number, ids = model.embedding.number, torch.tensor([[1, 8, 3]])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        compiled.embedding, (ids, number, 64, model.embedding.dtype), test_utils=tests
    )
    torch.library.opcheck(
        compiled.linear, (torch.randn(2, 64), model.linear.number, 9), test_utils=tests
    )


def test_copies_are_modules_of_their_own() -> None:
    first = Model().linear
    second = copy.deepcopy(first)
    second.weight.data.zero_()
    x = torch.randn(2, 64)
    for module in (first, second):
        assert torch.equal(compiled.linear(x, module.number, 9), module(x))
    assert not torch.equal(first(x), second(x))


@pytest.mark.parametrize(
    ("label", "rules", "compiles"),
    [("w4g32", None, True), ("w4g32-2:4", None, False), ("w4g32", "teal", False)],
)
def test_generate_compiles_no_sparse_weights_and_no_rules(
    label: str, rules: str | None, compiles: bool
) -> None:
    activations = rules and {"method": rules, "share": 0.5, "rules": {"head": "value"}}
    config = CptqConfig(modules={"head": label}, activations=activations)
    assert CptqQuantizer(config).is_compileable is compiles
