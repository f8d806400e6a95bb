"""The inventory of every family against the model itself: modules, hooks, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from cptq.checkpoint import architectures
from cptq.checkpoint.architectures import ARCHITECTURES, GENERIC
from cptq.checkpoint.inventory import Inventory, find_blocks, find_ties, take_inventory
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ModelError
from cptq.types import Event, LayerSpec, Notice, TensorSpec
from tests.conftest import TinyModel
from tests.quick import cover, keep_quick
from tests.tiny_models import BLOCKS, RECIPES, VARIED
from tests.unit.checkpoint.made import load
from tests.unit.checkpoint.test_named_families import ROLES

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
    known = set(architectures.ARCHITECTURES) - set(ROLES)
    assert {r.model_type for r in RECIPES.values()} - {"phi"} == known - {"olmo", "cohere"}


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
    # of embeddings and heads it is said once the runtime is known
    assert {s.reason for s in dense if s.kind not in ("embedding", "head")} <= told
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
    inferred = [e for e in events if isinstance(e, Notice) and "family" in e.message]
    assert len(inferred) == (arch == "generic")


def test_the_longest_input_runs(made: Made) -> None:
    _, model, _ = made
    longest = model.max_positions
    assert longest == (254 if model.family in ("roberta", "mpnet") else 256)
    ids = torch.randint(5, 300, (1, longest), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert bool(torch.isfinite(output[0]).all())


@pytest.mark.parametrize(
    ("arch", "tied"),
    cover(["llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert-mlm"], [False, True], at_once=1),
)
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


@pytest.mark.parametrize("arch", keep_quick((a for a in RECIPES if a != "generic"), *VARIED))
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


# Models that are out of the ordinary: what is kept dense and why, what is refused.

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


def test_blocks_that_run_out_of_order_are_one_block() -> None:
    events: list[Event] = []
    found = inventory(Toy(order=(0, 1, 0)), events)
    assert found.block_names == ("",)
    assert {unit.block for unit in found.units} == {0}
    assert any("are not a chain" in e.message for e in events if isinstance(e, Notice))


class Rounding(nn.Linear):
    """Rounds its input first, as BitNet's layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.round())


class Router(nn.Linear):
    """Returns scores and choices, as Llama-4's does."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Transposed(nn.Linear):
    """Multiplies in its own words, as Falcon's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_a_weight_that_other_code_reads_is_dense() -> None:
    model = Toy()
    block, forward = model.blocks[1], model.blocks[1].forward
    block.forward = lambda x: forward(x.to(block.third.weight.dtype))
    specs = by_name(inventory(model))
    assert "reads its weight" in str(specs["blocks.1.third"].reason)
    assert specs["blocks.0.third"].compressible
    assert specs["blocks.1.first"].compressible


@pytest.mark.parametrize(("kind", "dense"), [(Rounding, True), (Router, True), (Transposed, False)])
def test_a_linear_that_does_more_than_multiply_is_dense(kind: type, dense: bool) -> None:
    model = Toy()
    inner = model.blocks[0].third
    model.blocks[0].third = kind(inner.in_features, inner.out_features)
    if kind is Router:
        model.blocks[0].forward = lambda x: x * model.blocks[0].third(x)[0]
    spec = by_name(inventory(model))["blocks.0.third"]
    assert spec.compressible is not dense
    assert (f"a forward of its own ({kind.__name__})" in str(spec.reason)) is dense


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
    with pytest.raises(ModelError, match="IndexError"):
        inventory(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_without_a_stack_there_are_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 9)), GENERIC) == ()


def test_the_stack_with_most_weights_is_the_blocks() -> None:
    model = Toy()
    model.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
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
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert "text models" in str(caught.value.allowed)
