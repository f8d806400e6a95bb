"""The inventory of every family against the model itself: modules, hooks, parameters."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint import architectures
from cptq.checkpoint.model import LoadedModel
from cptq.types import Event, Notice
from tests.conftest import TinyModel
from tests.tiny_models import BLOCKS, RECIPES
from tests.unit.checkpoint.made import load

_LLAMA = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_ATTENTION = {role: _LLAMA[role] for role in ("qkv", "o")}
_BERT = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "o": ("attention.output.dense",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}
#: the decisions of one block in forward order: role -> ends of the linears' names
UNITS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    # as they are loaded for anything but compression: the experts stacked, in no linear layer
    "qwen3_moe": _ATTENTION,
    "olmoe": _ATTENTION,
    "qwen2_moe": _LLAMA | {"shared_expert_gate": ("shared_expert_gate",)},
    "opt": {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("out_proj",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
    "gpt2": {},
    "gpt_neox": {
        "qkv": ("query_key_value",),
        "o": ("attention.dense",),
        "fc1": ("dense_h_to_4h",),
        "fc2": ("dense_4h_to_h",),
    },
    "bert": _BERT,
    "bert-encoder": _BERT,
    "bert-mlm": _BERT,
    "roberta": _BERT,
    "distilbert": {
        "qkv": ("q_lin", "k_lin", "v_lin"),
        "o": ("out_lin",),
        "fc1": ("lin1",),
        "fc2": ("lin2",),
    },
    "mpnet": {
        "qkv": ("attn.q", "attn.k", "attn.v"),
        "o": ("attn.o",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    "generic": {
        "q_proj+k_proj+v_proj": ("q_proj", "k_proj", "v_proj"),
        "dense": ("self_attn.dense",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
}
Made = tuple[str, LoadedModel, list[Event]]
KINDS = {"bert": "classifier", "distilbert": "classifier", "roberta": "classifier"} | {
    "bert-encoder": "encoder",
    "mpnet": "encoder",
    "bert-mlm": "masked-lm",
}


def weighty(module: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | nn.Embedding | Conv1D
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def observed_order(model: LoadedModel) -> list[str]:
    """Names in the order in which the modules give their first output, on a batch of our own."""
    seen: dict[str, None] = {}
    parts = weighty(model.module)
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
        for name, part in parts.items()
    ]
    ids = torch.arange(5, 35).view(2, 15)
    with torch.no_grad():
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return list(seen) + [name for name in parts if name not in seen]


@pytest.fixture(scope="module", params=list(RECIPES))
def made(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Made:
    events: list[Event] = []
    return request.param, load(tiny_model(request.param), events), events


def test_recipes_and_expectations_are_the_same_families() -> None:
    assert set(UNITS) == set(RECIPES)
    assert {r.model_type for r in RECIPES.values()} - {"phi"} == set(architectures.ARCHITECTURES)


def test_every_matrix_is_listed_once_in_forward_order(made: Made) -> None:
    _, model, _ = made
    names = [spec.name for spec in model.layers]
    assert names == observed_order(model)
    assert len(set(names)) == len(names)


def test_shapes_kinds_and_types_are_those_of_the_modules(made: Made) -> None:
    _, model, _ = made
    for spec in model.layers:
        part = model.linear(spec.name)
        if isinstance(part, Conv1D):
            shape, kind = (part.nf, part.nx), "conv1d"
        elif isinstance(part, nn.Embedding):
            shape, kind = (part.num_embeddings, part.embedding_dim), "embedding"
        else:
            shape, kind = (part.out_features, part.in_features), "linear"
        head = part is model.module.get_output_embeddings()
        assert spec.shape == shape
        assert spec.kind == ("head" if head else kind)
        assert spec.transposed is isinstance(part, Conv1D)
        assert spec.dtype == "F32"


def test_the_decisions_are_those_of_the_family(made: Made) -> None:
    arch, model, _ = made
    expected = [(block, role) for block in range(BLOCKS) for role in UNITS[arch]]
    assert [(unit.block, unit.role) for unit in model.units] == expected
    for unit in model.units:
        ends = UNITS[arch][unit.role]
        stem = f"{model.block_names[unit.block]}."
        names = [spec.name for spec in unit.layers]
        assert len(names) == len(ends)
        for end in ends:
            assert len([n for n in names if n.startswith(stem) and n.endswith(f".{end}")]) == 1
        assert {spec.fused for spec in unit.layers} == {unit.name if len(ends) > 1 else None}
        assert unit.name == names[0] if len(ends) == 1 else unit.name not in names
    assert len({unit.name for unit in model.units}) == len(model.units)


def test_every_linear_of_a_block_is_in_one_decision(made: Made) -> None:
    _, model, _ = made
    members = [spec.name for unit in model.units for spec in unit.layers]
    inside = [
        name
        for name, part in weighty(model.module).items()
        if isinstance(part, nn.Linear)
        and name.startswith(tuple(f"{b}." for b in model.block_names))
    ]
    assert sorted(members) == sorted(inside)
    assert len(model.block_names) == BLOCKS
    for index, name in enumerate(model.block_names):
        assert model.blocks[index] is model.module.get_submodule(name)


def test_what_is_kept_dense_says_why(made: Made) -> None:
    arch, model, events = made
    members = {spec.name for unit in model.units for spec in unit.layers}
    dense = [spec for spec in model.layers if spec.name not in members]
    assert all(spec.reason and not spec.compressible and not spec.fused for spec in dense)
    assert not any(s.reason or not s.compressible for s in model.layers if s.name in members)
    told = {event.message for event in events if isinstance(event, Notice)}
    assert {spec.reason for spec in dense} <= told
    conv1d = [spec for spec in dense if spec.kind == "conv1d"]
    assert len(conv1d) == (4 * BLOCKS if arch == "gpt2" else 0)
    assert all("Conv1D" in spec.reason for spec in conv1d)


def test_weights_are_counted_once(made: Made) -> None:
    _, model, _ = made
    assert model.parameters == sum(p.numel() for p in model.module.parameters())
    assert len({spec.name for spec in model.tensors}) == len(model.tensors)


def test_the_kind_and_the_family(made: Made) -> None:
    arch, model, events = made
    assert model.kind == KINDS.get(arch, "causal-lm")
    assert model.family == ("generic" if arch == "generic" else RECIPES[arch].model_type)
    inferred = [e for e in events if isinstance(e, Notice) and "no known family" in e.message]
    assert len(inferred) == (arch == "generic")


def test_the_longest_input_runs(made: Made) -> None:
    _, model, _ = made
    longest = model.max_positions
    assert longest == (254 if model.family in ("roberta", "mpnet") else 256)
    ids = torch.randint(5, 300, (1, longest), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert bool(torch.isfinite(output[0]).all())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert-mlm"])
def test_a_tied_head_is_listed_and_counted_once(
    arch: str, tied: bool, tiny_model: TinyModel
) -> None:
    model = load(tiny_model(arch, tied=tied))
    head = model.module.get_output_embeddings()
    embedding = model.module.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    names = {id(part): name for name, part in weighty(model.module).items()}
    specs = {spec.name: spec for spec in model.layers}
    spec = specs[names[id(head)]]
    assert spec.kind == "head"
    assert spec.tied_to == (names[id(embedding)] if tied else None)
    stored = {tensor.name for tensor in model.tensors}
    assert (spec.weight_name in stored) is not tied
    assert specs[names[id(embedding)]].weight_name in stored
    assert model.parameters == sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("arch", [arch for arch in RECIPES if arch != "generic"])
def test_an_unknown_family_gives_the_same_decisions(
    arch: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load(tiny_model(arch))
    monkeypatch.setattr(architectures, "ARCHITECTURES", {})
    inferred = load(tiny_model(arch))
    assert inferred.family == "generic"
    assert inferred.block_names == known.block_names
    names = [[[spec.name for spec in u.layers] for u in m.units] for m in (known, inferred)]
    assert names[0] == names[1]
    assert [u.block for u in inferred.units] == [u.block for u in known.units]
    assert inferred.fingerprint == known.fingerprint
