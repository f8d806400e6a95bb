"""Weights that come and go: the same numbers whatever the limit, and the dense model again."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from cptq.checkpoint.loader import AUTO_CLASSES, _limit_weights, load_model
from cptq.checkpoint.memory import BASE, Memory
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.resident import HeldForward, find_weight
from cptq.checkpoint.weights import (
    get_stored_weight,
    get_weight,
    make_weight,
    replace_weight,
    set_weight,
)
from cptq.compression.blockwise import compress_model
from cptq.config import ModelSettings
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Budget, Candidate, Event, Plan
from tests.conftest import TinyModel
from tests.quick import cover, keep_quick
from tests.reference.sensitivity import random_calibration
from tests.unit.checkpoint.made import edit_weights

#: bytes that hold no block of a tiny model, so that each is alone in memory
NOTHING = Memory(total=BASE)


def quiet(_event: Event) -> None:
    """Drop an event."""


def narrowed(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """Return a copy of a checkpoint that stores another floating type."""
    shutil.copytree(source, target)
    return edit_weights(
        target, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()})
    )


def opened(path: Path, memory: Memory | None = None, **options: Any) -> LoadedModel:
    settings = ModelSettings(model=str(path), device="cpu")
    return load_model(settings, quiet, memory=memory, experts=True, **options)


@torch.no_grad()
def run(model: LoadedModel) -> Tensor:
    ids = torch.arange(3, 20)[None]
    result = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    return result.logits if hasattr(result, "logits") else result.last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    cover(
        ["llama", "gpt2", "bert-mlm", "qwen3_moe", "opt", "bert", "mpnet"],
        [torch.float32, torch.bfloat16, torch.float16],
        at_once=1,
    ),
)
@torch.no_grad()
def test_outputs_are_those_of_transformers_in_float32(
    arch: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = narrowed(tiny_model(arch), tmp_path / "model", dtype)
    one_by_one = opened(path, NOTHING)
    auto = getattr(transformers, AUTO_CLASSES[one_by_one.kind])
    stock = auto.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    wanted = stock(input_ids=ids, attention_mask=torch.ones_like(ids))
    wanted = wanted.logits if hasattr(wanted, "logits") else wanted.last_hidden_state
    for model in (one_by_one, opened(path)):
        got = run(model)
        assert got.dtype is torch.float32
        if arch == "qwen3_moe":  # experts are split, so their sums are in another order
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, wanted)
    assert torch.equal(run(one_by_one), run(opened(path)))


@torch.no_grad()
def test_only_what_runs_is_in_memory(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = opened(narrowed(tiny_model("llama"), tmp_path / "m", torch.bfloat16), NOTHING)
    weights = [find_weight(model.linear(s.name)) for s in model.layers if s.block is not None]
    assert len(weights) > 4
    assert not any(w is None or w.current is not None for w in weights)
    there: list[int] = []

    def count(*_: Any) -> None:
        there.append(sum(w is not None and w.current is not None for w in weights))

    handles = [block.register_forward_hook(count) for block in model.blocks]
    inner = [m.mlp.register_forward_hook(count) for m in model.blocks]
    run(model)
    for handle in handles + inner:
        handle.remove()
    each = len(weights) // len(model.blocks)
    # inside a block its own; after its end, when its hook is called, none
    assert there == [each, 0] * len(model.blocks)


def test_what_is_not_there_cannot_be_read_by_mistake(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = opened(narrowed(tiny_model("llama"), tmp_path / "m", torch.float16), NOTHING)
    linear = model.linear(model.units[0].layers[0].name)
    assert linear.weight.shape == get_weight(linear).shape
    assert linear.weight.dtype is torch.float32
    assert bool(linear.weight.isnan().all())
    assert linear.weight.untyped_storage().nbytes() <= 8
    assert get_weight(linear).dtype is torch.float16
    with pytest.raises(RuntimeError):
        linear.weight.data.add_(1)


@pytest.mark.parametrize("memory", [None, NOTHING])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_weight_can_be_set_replaced_made_and_had_again(
    arch: str, memory: Memory | None, tiny_model: TinyModel
) -> None:
    model = opened(tiny_model(arch), memory, conv1d=True)
    name = model.units[1].layers[0].name
    linear, dense = model.linear(name), get_weight(model.linear(name)).clone()
    before = run(model)
    set_weight(linear, dense + 1)
    assert torch.equal(get_weight(linear), dense + 1)
    assert torch.equal(get_stored_weight(linear), dense)
    changed = run(model)
    assert not torch.equal(changed, before)
    with replace_weight(linear, dense * 2):
        assert torch.equal(get_weight(linear), dense * 2)
        assert not torch.equal(run(model), changed)
    assert torch.equal(get_weight(linear), dense + 1)
    make_weight(linear, lambda: dense + 1)
    assert torch.equal(get_weight(linear), dense + 1)
    assert torch.equal(run(model), changed)
    model.restore_dense()
    assert torch.equal(get_weight(linear), dense)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("memory", [None, NOTHING])
def test_tied_matrices_stay_one(memory: Memory | None, tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama", tied=True), memory)
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    assert embedding.weight is head.weight
    set_weight(embedding, torch.zeros_like(get_weight(embedding)))
    assert torch.equal(get_weight(head), torch.zeros_like(get_weight(head)))
    assert float(run(model).abs().max()) == 0
    assert embedding.weight is head.weight


def mixed_plan(model: LoadedModel) -> Plan:
    widths = (3, 16, 4, 2)
    choices = {
        unit.name: Candidate(bits=widths[i % 4], group_size=0 if widths[i % 4] == 16 else 16)
        for i, unit in enumerate(model.units)
    }
    choices |= {unit.name: Candidate(bits=4, group_size=16) for unit in model.vocabulary}
    budget = Budget(limit_bytes=0, asked="by hand")
    return Plan(
        model_fingerprint=model.fingerprint,
        budget=budget,
        allocator="even",
        metric=None,
        table_digest=None,
        choices=choices,
        predicted_bytes=0,
        predicted_loss=None,
    )


@pytest.mark.parametrize(
    "arch", keep_quick(("llama", "opt", "bert", "qwen3_moe"), "opt", "qwen3_moe")
)
def test_compression_gives_the_same_bits_one_block_at_a_time(
    arch: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = narrowed(tiny_model(arch), tmp_path / "m", torch.bfloat16)
    made = []
    for memory in (None, NOTHING):
        model = opened(path, memory)
        text = random_calibration(model, rows=5, length=21)
        layers = compress_model(
            model,
            text,
            mixed_plan(model),
            compressor="gptaq",
            layout=PACKED_LAYOUT,
            held_out=text.batches[:1],
            emit=quiet,
        )
        made.append((layers, run(model)))
        if memory is not None:
            assert model.spill.limit == 0
            assert model.resident is not None
            assert model.resident.limit == 0
    (one, z), (two, other) = made
    assert len(one) == len(two) > 4
    for a, b in zip(one, two, strict=True):
        assert a.spec == b.spec
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
        assert a.result.output_error == b.result.output_error
    assert torch.equal(z, other)


@pytest.mark.parametrize("memory", [None, NOTHING])
def test_a_copy_stays_dense_when_the_model_changes(
    memory: Memory | None, tiny_model: TinyModel
) -> None:
    model = opened(tiny_model("llama"), memory)
    before = run(model)
    twin = copy.deepcopy(model)
    for unit in model.units:
        for spec in unit.layers:
            set_weight(model.linear(spec.name), torch.zeros(spec.shape))
    assert not torch.equal(run(model), before)
    assert torch.equal(run(twin), before)
    own = vars(twin.blocks[0])["forward"]
    assert isinstance(own, HeldForward)
    assert own.__wrapped__.__self__ is twin.blocks[0]


def test_a_pinned_model_is_there_as_a_whole_and_written_in_place(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama"), NOTHING)
    before, linear = run(model), model.linear(model.units[0].layers[0].name)
    assert model.resident is not None
    model.resident.pin()
    assert torch.equal(run(model), before)
    parameter, dense = linear.weight, get_weight(linear).clone()
    set_weight(linear, dense + 1)
    assert linear.weight is parameter
    assert torch.equal(parameter.detach(), dense + 1)
    assert torch.equal(get_stored_weight(linear), dense)


def test_constants_are_computed_in_the_type_of_the_run(tmp_path: Path) -> None:
    """Gemma-3 keeps sqrt(width) as a buffer in the type that it is built in."""
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = stock.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for memory in (None, NOTHING):
        assert torch.equal(run(opened(tmp_path / "m", memory)), wanted)


def test_the_memory_of_the_machine_does_not_limit_a_gpu_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert _limit_weights(None, cpu) is None
    assert _limit_weights(Memory(total=BASE + 30), cpu) == 10
    assert _limit_weights(Memory(total=BASE + 30), gpu) == 600
    assert _limit_weights(Memory(total=BASE + 30, of_gpu=0.9), gpu) == 900
    assert _limit_weights(Memory(total=BASE + 30), torch.device("mps")) is None
    assert _limit_weights(Memory(total=BASE + 30, asked=True), gpu) == 10
