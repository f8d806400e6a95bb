"""The decoder in C against the forward pass of transformers with the same modules."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config
from transformers.pytorch_utils import Conv1D

from cptq.inference import operations
from cptq.inference.activations import count_dropped, without_activation_sparsity
from cptq.inference.generation import GREEDY, Sampling, decode
from cptq.inference.modules import (
    PackedLinear,
    PackedModule,
    make_packed_module,
    remove_rules,
)
from cptq.inference.native import decoder as native
from cptq.inference.native.decoder import NativeDecoder, UnsupportedModelError
from cptq.inference.native.library import has_library
from cptq.types import Candidate
from tests.conftest import TinyModel
from tests.tiny_models import POSITIONS, RECIPES, VOCABULARY

pytestmark = pytest.mark.skipif(
    not has_library(), reason="needs the C library, which has to be compiled"
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2"]
#: cycled over the modules, so that neighbours differ; None stays dense
SCHEMES = ["w4g16-row", None, "w3c", "w2g16-asym", "w8g16", "w5c-asym", "w6g16-row"]
PROMPT = [5, 77, 123, 9, 250, 31, 64, 8, 199, 140, 71]


def pack_at_random(model: nn.Module, schemes: list[str | None] = SCHEMES) -> None:
    """Replace linears and embeddings by packed ones of random codes and scales of mixed signs."""
    torch.manual_seed(3)
    labels = cycle(schemes)
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, nn.Embedding, Conv1D):
            continue
        label = next(labels)
        packed = None if label is None else make_packed_module(module, Candidate.parse(label))
        if packed is None:
            continue
        for part, parameter in packed.named_parameters():
            if parameter.dtype is torch.int32:
                parameter.data = torch.randint(-(2**31), 2**31 - 1, parameter.shape).int()
            else:
                spread = 1.0 if part == "bias" else 2.0**-packed.scheme.bits
                parameter.data = torch.randn(parameter.shape) * spread * 0.3
        model.set_submodule(name, packed)


@pytest.fixture
def load(tiny_model: TinyModel) -> Any:
    def load_model(arch: str, **options: Any) -> Any:
        if arch == "phi3":
            torch.manual_seed(0)
            sizes = dict(RECIPES["llama"].config) | {"vocab_size": VOCABULARY, "pad_token_id": 0}
            return AutoModelForCausalLM.from_config(Phi3Config(**sizes)).eval()
        return AutoModelForCausalLM.from_pretrained(tiny_model(arch), **options).eval()

    return load_model


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_logits_are_those_of_the_model(
    arch: str, packed: bool, load: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in parts of unequal size, then token by token; again after forgetting."""
    monkeypatch.setattr(native, "CHUNK", 4)
    model = load(arch)
    if packed:
        pack_at_random(model)
        assert sum(isinstance(m, PackedModule) for m in model.modules()) > 6
    expected_TV = model(torch.tensor([PROMPT])).logits[0]
    decoder = NativeDecoder(model, capacity=len(PROMPT))
    for cut in (1, 6, len(PROMPT)):
        decoder.reset()
        found = decoder.run(PROMPT[:cut])
        torch.testing.assert_close(found, expected_TV[cut - 1], rtol=1e-3, atol=1e-4)
        for place in range(cut, len(PROMPT)):
            found = decoder.run([PROMPT[place]])
            torch.testing.assert_close(found, expected_TV[place], rtol=1e-3, atol=1e-4)
    decoder.reset(5)
    found = decoder.run(PROMPT[5:])
    torch.testing.assert_close(found, expected_TV[-1], rtol=1e-3, atol=1e-4)


def drop_at_random(model: nn.Module, function: str) -> None:
    """Give packed linears rules of all kinds, with thresholds amid their inputs."""
    labels = cycle(["value", "channel", "spread", "zeros", ""])
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear) or name == "lm_head":
            continue
        label = f"gate-{function}" if name.endswith("gate_proj") else next(labels)
        module.set_rule(label)
        for value in module.rule_tensors.values():
            value.data = torch.rand(value.shape) * 0.5


@torch.no_grad()
@pytest.mark.parametrize(("arch", "function"), [("llama", "silu"), ("opt", ""), ("phi3", "")])
def test_rules_drop_the_same_inputs_as_in_the_model(
    arch: str, function: str, load: Any, threads: int
) -> None:
    model = load(arch)
    pack_at_random(model, ["w4g16-row", "w3c", "w8g16"])
    drop_at_random(model, function)
    decoder = NativeDecoder(model, capacity=len(PROMPT))
    with count_dropped() as counted:
        expected_TV = model(torch.tensor([PROMPT])).logits[0]
    assert 0.1 < counted.share < 0.9
    found = decoder.run(PROMPT[:-1])
    torch.testing.assert_close(found, expected_TV[-2], rtol=1e-3, atol=1e-4)
    found = decoder.run(PROMPT[-1:])
    torch.testing.assert_close(found, expected_TV[-1], rtol=1e-3, atol=1e-4)
    with without_activation_sparsity():
        decoder.reset()
        expected_V = model(torch.tensor([PROMPT])).logits[0, -1]
        found = decoder.run(PROMPT)
    torch.testing.assert_close(found, expected_V, rtol=1e-3, atol=1e-4)
    assert float((expected_V - expected_TV[-1]).abs().max()) > 0.01


def test_a_decoder_is_made_anew_for_other_rules(load: Any) -> None:
    model = load("llama")
    pack_at_random(model, ["w4g16-row", "w3c", "w8g16"])
    ids = torch.tensor([PROMPT])
    usual = decode(model, ids, new_tokens=3)
    drop_at_random(model, "silu")
    ruled = decode(model, ids, new_tokens=3)
    assert (usual.way, ruled.way) == ("own loop", "own loop")
    assert ruled.steps == decode(copy.deepcopy(model), ids, new_tokens=3).steps != usual.steps
    model.model.layers[0].self_attn.q_proj.set_rule("low-rank-2")
    assert "low-rank" in decode(model, ids, new_tokens=3).why
    remove_rules(model)
    assert decode(model, ids, new_tokens=3).steps == usual.steps


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)], ids=str
)
def test_dense_weights_of_16_bits_stay_so(dtype: torch.dtype, tolerance: float, load: Any) -> None:
    model = load("llama", dtype=dtype)
    exact_TV = load("llama", dtype=dtype).float()(torch.tensor([PROMPT])).logits[0]
    found = NativeDecoder(model, capacity=20).run(PROMPT)
    torch.testing.assert_close(found, exact_TV[-1], rtol=1e-3, atol=1e-3)  # float32 activations
    assert found.dtype is torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dense_weights_of_8_bit_floats(dtype: torch.dtype, load: Any) -> None:
    model = load("llama")
    table = model.model.embed_tokens.weight.data.to(dtype)
    model.model.embed_tokens.weight.data = table.float()
    expected = model(torch.tensor([PROMPT])).logits[0, -1]
    decoder = NativeDecoder(model, capacity=20)
    model.model.embed_tokens.weight.data = table
    builder = native._Builder(model, 20)
    decoder._struct.embedding = builder.project(model.model.embed_tokens)
    torch.testing.assert_close(decoder.run(PROMPT), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_rounded_activations_are_near_and_not_equal(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    pack_at_random(model, ["w8g16"])
    decoder = NativeDecoder(model, capacity=20)
    exact = decoder.run(PROMPT)
    monkeypatch.setattr(operations, "_exact", False)
    decoder.reset()
    rounded = decoder.run(PROMPT)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.05
    torch.testing.assert_close(
        rounded, model(torch.tensor([PROMPT])).logits[0, -1], rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9, seed=4)])
def test_it_writes_what_generate_writes(sampling: Sampling, load: Any) -> None:
    model = load("llama")
    dense = decode(model, torch.tensor([PROMPT]), new_tokens=12, sampling=sampling)
    assert dense.way == "generate"
    pack_at_random(model, ["w4g16", "w5g16"])
    ids = torch.tensor([PROMPT])
    own = decode(model, ids, new_tokens=12, sampling=sampling)
    twice = decode(model, ids.repeat(2, 1), new_tokens=12, sampling=GREEDY)
    assert (own.way, twice.way) == ("own loop", "generate")
    assert len(own.steps) == len(own.known) == 12
    if sampling == GREEDY:
        assert [row for (row,) in own.steps] == [rows[0] for rows in twice.steps]
    else:
        again = decode(model, ids, new_tokens=12, sampling=sampling)
        assert again.steps == own.steps
        assert own.steps != twice.steps


def test_it_stops_where_generate_stops(load: Any) -> None:
    model = load("llama")
    pack_at_random(model, ["w4g16", "w5g16"])
    heard: list[list[int]] = []
    free = decode(model, torch.tensor([PROMPT]), new_tokens=9)
    stop = free.steps[3][0]
    ended = decode(model, torch.tensor([PROMPT]), new_tokens=9, stop=[stop], receive=heard.append)
    first = next(i for i, (token,) in enumerate(free.steps) if token == stop)
    assert ended.steps == free.steps[: first + 1]
    assert [tuple(tokens) for tokens in heard] == list(ended.steps)


@pytest.mark.parametrize(
    ("arch", "change", "why"),
    [
        (
            "gpt_neox",
            {},
            "the family 'gpt_neox' is not among gpt2, llama, mistral, opt, phi3, qwen2, qwen3",
        ),
        ("mistral", {"sliding_window": 16}, "exceed its window of 16"),
        ("llama", {"hidden_act": "tanh"}, "its activation is 'tanh'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its rotation is 'dynamic'",
        ),
    ],
)
def test_what_it_does_not_know_is_refused(
    arch: str, change: dict[str, Any], why: str, load: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        NativeDecoder(load(arch, **change), capacity=32)


@pytest.mark.parametrize("scheme", ["w3g16-s50", "w3c-2:4"])
def test_sparse_weights_are_left_to_generate(scheme: str, load: Any) -> None:
    model = load("llama")
    place = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = make_packed_module(place, Candidate.parse(scheme))
    with pytest.raises(UnsupportedModelError, match="sparse weights"):
        NativeDecoder(model, capacity=8)


def test_a_model_that_computes_otherwise_is_found_out(load: Any) -> None:
    model = load("llama")
    model.model.layers[1].self_attn.scaling *= 1.5  # read from the first block only
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        NativeDecoder(model, capacity=32)


def test_what_does_not_fit_is_refused(load: Any) -> None:
    model = load("llama")
    with pytest.raises(UnsupportedModelError, match=f"exceed its {POSITIONS} positions"):
        NativeDecoder(model, capacity=POSITIONS + 1)
    decoder = NativeDecoder(model, capacity=4)
    with pytest.raises(ValueError, match="5 tokens; 1 to 4 have room"):
        decoder.run([1, 2, 3, 4, 5])
    with pytest.raises(IndexError, match="vocabulary"):
        decoder.run([VOCABULARY])
    assert decoder.length == 0


def test_what_generate_decodes_says_why(load: Any) -> None:
    model = load("gpt_neox")
    pack_at_random(model, ["w4c"])
    found = decode(model, torch.tensor([PROMPT]), new_tokens=2)
    assert (found.way, found.why[:23]) == ("generate", "the family 'gpt_neox' i")
    rows = decode(load("llama"), torch.tensor([PROMPT]), new_tokens=2)
    assert (rows.way, rows.why) == ("generate", "")


def test_a_decoder_neither_binds_a_model_nor_keeps_it(load: Any) -> None:
    model = load("llama")
    pack_at_random(model, ["w4g16"])
    first = decode(model, torch.tensor([PROMPT]), new_tokens=3)
    again = decode(copy.deepcopy(model), torch.tensor([PROMPT]), new_tokens=3)
    assert (again.way, again.steps) == ("own loop", first.steps)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
