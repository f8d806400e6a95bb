"""The block-by-block driver against a copy of the model, hooks and a loop over tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from cptq.calibration.objective import select_real_rows
from cptq.calibration.replay import forward
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import blockwise, gptq, nearest
from cptq.compression.blockwise import compress_model
from cptq.compression.layer import LayerProblem, LayerSolution
from cptq.compression.streams import DENSE_SHARE
from cptq.errors import CalibrationError, UnknownNameError
from cptq.layouts.groups import resolve_group
from cptq.layouts.pack_quantized import list_packed_tensors
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.asymmetric_target import compute_asymmetric_targets
from cptq.numerics.grid import dequantize_layer
from cptq.types import Budget, Candidate, CompressedLayer, Event, Notice, Plan, Progress
from tests.conftest import TinyModel
from tests.left_behind import list_left_behind
from tests.quick import keep_quick
from tests.reference.moments import naive_cross_moment, naive_moment
from tests.reference.sensitivity import loaded, random_calibration
from tests.tiny_models import RECIPES, VOCABULARY

DENSE = Candidate(bits=16)
#: cycled over the units, so that every model meets dense units, odd groups and all grids
MIXED = [Candidate(bits=4, group_size=16), Candidate(bits=3, group_size=20), DENSE]
MIXED += [Candidate(bits=2), Candidate(bits=5, group_size=8), Candidate(bits=8, group_size=64)]


def plan_for(model: LoadedModel, candidates: Sequence[Candidate]) -> Plan:
    choices = dict(zip([unit.name for unit in model.units], cycle(candidates), strict=False))
    return Plan(
        model_fingerprint=model.fingerprint,
        budget=Budget(limit_bytes=0, asked="by hand"),
        allocator="by hand",
        metric=None,
        table_digest=None,
        choices=choices,
        predicted_bytes=0,
        predicted_loss=None,
    )


def padded(model: LoadedModel) -> Calibration:
    """Rows of several lengths, also for causal models."""
    calibration = random_calibration(model, rows=5, length=21)
    generator = torch.Generator().manual_seed(5)
    batches = []
    for lengths in ((21, 9, 14), (11, 17)):
        ids = torch.randint(5, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return Calibration(batches=batches, record=calibration.record)


def run(
    model: LoadedModel,
    calibration: Calibration,
    candidates: Sequence[Candidate] = MIXED,
    compressor: str = "nearest",
    events: list[Event] | None = None,
) -> list[CompressedLayer]:
    emit = (events if events is not None else []).append
    return compress_model(
        model, calibration, plan_for(model, candidates), compressor=compressor, emit=emit
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[LayerProblem]:
    """Every problem that the driver poses, answered by rounding to nearest."""
    problems: list[LayerProblem] = []

    def answer(problem: LayerProblem) -> LayerSolution:
        problems.append(replace(problem, W_OI=problem.W_OI.clone()))
        return nearest.compress(problem)

    table = SimpleNamespace(get=lambda _name: answer)
    monkeypatch.setattr(blockwise, "COMPRESSORS", table)
    return problems


@pytest.mark.parametrize(
    "arch",
    keep_quick(
        (a for a in RECIPES if a != "gpt2"), "llama", "gpt_neox", "bert", "mpnet", "qwen3_moe"
    ),
)
def test_a_block_sees_what_the_compressed_blocks_before_it_give(
    arch: str, tiny_model: TinyModel, seen: list[LayerProblem]
) -> None:
    model = loaded(tiny_model(arch))
    dense, calibration = copy.deepcopy(model.module), padded(model)
    layers = run(model, calibration)
    assert len(layers) == len(seen) > 6
    partly, block = copy.deepcopy(dense), 0
    for layer, problem in zip(layers, seen, strict=True):
        if layer.spec.block != block:  # the blocks before this one are compressed by now
            block = layer.spec.block
            for done in layers:
                if done.spec.block < block:
                    set_weight(
                        partly.get_submodule(done.spec.name), dequantize_layer(done, torch.float32)
                    )
        expected = naive_moment(partly, layer.spec.name, calibration.batches)
        torch.testing.assert_close(problem.H_II.double(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(problem.W_OI, get_weight(dense.get_submodule(layer.spec.name)))


@pytest.mark.parametrize(
    ("arch", "rounded"),
    [(arch, False) for arch in ("opt", "gpt_neox", "mpnet")]
    + [(arch, True) for arch in ("llama", "bert")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("llama", False), ("bert", False), ("gpt_neox", True))
    ],
)
def test_a_unit_makes_up_for_the_errors_of_those_before_it(
    arch: str, rounded: bool, tiny_model: TinyModel, seen: list[LayerProblem]
) -> None:
    """Its target, against whole forward passes of the dense and of the partly compressed model.

    `rounded`: the embedding is compressed too, first, and makes an error as well.
    """
    model = loaded(tiny_model(arch))
    dense, calibration = copy.deepcopy(model.module), padded(model)
    plan = plan_for(model, MIXED)
    if rounded:
        first = model.vocabulary[0].name
        coarse = Candidate(bits=3, group_size=16)
        plan = replace(plan, choices={**plan.choices, first: coarse})
    layers = compress_model(
        model,
        calibration,
        plan,
        compressor="gptaq",
        layout=PACKED_LAYOUT,
        emit=lambda event: None,
    )
    partly = copy.deepcopy(dense)
    if rounded:
        embedding, *layers = layers
        assert embedding.spec.name == first
        weight = dequantize_layer(embedding, torch.float32)
        set_weight(partly.get_submodule(embedding.spec.name), weight)
    by_name = {layer.spec.name: (layer, asked) for layer, asked in zip(layers, seen, strict=True)}
    moved = 0
    for unit in model.units:
        found = [by_name[spec.name] for spec in unit.layers if spec.name in by_name]
        for layer, asked in found:
            name = layer.spec.name
            H_II = naive_moment(partly, name, calibration.batches)
            halved = calibration.batches[: math.ceil(len(calibration.batches) * DENSE_SHARE)]
            C_II = naive_cross_moment(dense, partly, name, halved)
            torch.testing.assert_close(asked.H_II.double(), H_II, rtol=1e-3, atol=1e-4)
            W_OI = get_weight(dense.get_submodule(name)).double()
            (expected,) = compute_asymmetric_targets([W_OI], H_II, C_II)
            torch.testing.assert_close(asked.W_OI.double(), expected, rtol=2e-3, atol=2e-3)
            moved += not torch.allclose(expected, W_OI, atol=1e-4)
        for layer, _ in found:
            weight = dequantize_layer(layer, torch.float32)
            set_weight(partly.get_submodule(layer.spec.name), weight)
    assert moved > len(layers) / 2


def test_output_errors_are_those_on_held_out_text(tiny_model: TinyModel) -> None:
    """On inputs that the compressed blocks before give for text that did not calibrate."""
    model = loaded(tiny_model("llama"))
    dense, calibration = copy.deepcopy(model.module), padded(model)
    held_out = random_calibration(model, rows=3, length=19).batches
    events: list[Event] = []
    layers = compress_model(
        model,
        calibration,
        plan_for(model, MIXED),
        compressor="gptq",
        held_out=held_out,
        emit=events.append,
    )
    first = layers[0]
    H_II = naive_moment(dense, first.spec.name, held_out)
    W_OI = get_weight(dense.get_submodule(first.spec.name)).double()
    D_OI = W_OI - dequantize_layer(first, torch.float64)
    expected = torch.trace(D_OI @ H_II @ D_OI.T) / torch.trace(W_OI @ H_II @ W_OI.T)
    assert first.result.output_error == pytest.approx(float(expected), rel=1e-3)
    assert all(layer.result.held_out for layer in layers)
    plain = run(loaded(tiny_model("llama")), calibration, compressor="gptq")
    for with_text, without in zip(layers, plain, strict=True):
        assert torch.equal(with_text.codes, without.codes)
        assert not without.result.held_out


@pytest.mark.parametrize("arch", ["llama", "bert", "opt", "mpnet", "generic"])
@pytest.mark.parametrize("compressor", ["gptq", "nearest"])
def test_the_module_holds_the_compressed_weights_and_nothing_else_changes(
    arch: str, compressor: str, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model(arch))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    layers = run(model, padded(model), compressor=compressor)
    chosen = plan_for(model, MIXED).choices
    wanted = [spec for unit in model.units if not chosen[unit.name].dense for spec in unit.layers]
    assert [layer.spec for layer in layers] == wanted
    for layer in layers:
        W_OI = get_weight(model.linear(layer.spec.name))
        assert torch.equal(W_OI, dequantize_layer(layer, torch.float32))
        assert not torch.equal(W_OI, before.pop(layer.spec.weight_name))
    after = model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not list_left_behind(model.module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_say_what_was_done(
    dtype: torch.dtype, tiny_model: TinyModel, seen: list[LayerProblem]
) -> None:
    model = loaded(tiny_model("llama", dtype=dtype))
    layers = run(model, random_calibration(model, rows=2, length=20))
    chosen = plan_for(model, MIXED).choices
    of = {spec.name: chosen[unit.name] for unit in model.units for spec in unit.layers}
    for layer, problem in zip(layers, seen, strict=True):
        result, candidate = layer.result, of[layer.spec.name]
        inputs = layer.spec.shape[1]
        group = resolve_group(inputs, candidate.group_size)
        assert (result.name, result.candidate) == (layer.spec.name, candidate)
        assert result.group_size == (0 if group == inputs else group)
        assert (problem.bits, problem.group) == (candidate.bits, group)
        assert layer.scale.dtype is problem.scale_dtype
        assert problem.scale_dtype is (torch.float16 if dtype is torch.float32 else dtype)
        assert layer.scale.shape == (layer.spec.shape[0], inputs // group)
        specs = list_packed_tensors(layer.spec, candidate.bits, inputs // group)
        assert result.nbytes == sum(spec.nbytes for spec in specs)
        W_OI = problem.W_OI.double()
        D_OI, H_II = W_OI - dequantize_layer(layer, torch.float64), problem.H_II.double()
        error = float(D_OI.square().sum() / W_OI.square().sum())
        assert result.weight_error == pytest.approx(error, rel=1e-4)
        output = float(torch.trace(D_OI @ H_II @ D_OI.T) / torch.trace(W_OI @ H_II @ W_OI.T))
        assert result.output_error == pytest.approx(output, rel=1e-3)
        assert result.seconds >= 0


def test_a_unit_shares_one_second_moment(tiny_model: TinyModel, seen: list[LayerProblem]) -> None:
    model = loaded(tiny_model("llama"))
    run(model, random_calibration(model, rows=2, length=20), [MIXED[0]])
    q, k, v, o = seen[:4]
    assert q.H_II is k.H_II is v.H_II
    assert o.H_II is not q.H_II


def test_a_plan_that_keeps_all_dense_changes_nothing(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    before = copy.deepcopy(model.module.state_dict())
    assert run(model, random_calibration(model, rows=2, length=20), [DENSE]) == []
    after = model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_without_units_is_left_alone(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("gpt2"))
    assert run(model, random_calibration(model, rows=2, length=20)) == []


def test_notes_are_told(tiny_model: TinyModel) -> None:
    model, events = loaded(tiny_model("llama")), []
    candidates = [Candidate(bits=4, group_size=20)]
    layers = run(model, random_calibration(model, rows=2, length=20), candidates, events=events)
    told = [(e.kind, e.subject, e.message) for e in events if isinstance(e, Notice)]
    expected = [("fallback", x.spec.name, note) for x in layers for note in x.result.notes]
    assert told == expected
    assert len(expected) == 12  # all but the two of 80 inputs
    steps = [(e.done, e.total) for e in events if isinstance(e, Progress)]
    assert steps == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("norm", "unit"),
    [
        ("model.layers.0.input_layernorm", "model.layers.0.self_attn.qkv"),
        ("model.layers.0.post_attention_layernorm", "model.layers.0.mlp.gate_up"),
        ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp.gate_up"),
    ],
)
def test_an_activation_that_is_not_finite_is_named(
    norm: str, unit: str, bad: float, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model("llama"))
    model.linear(norm).weight.data[7] = bad
    with pytest.raises(CalibrationError, match=f"the inputs of {unit} are NaN or inf") as caught:
        run(model, random_calibration(model, rows=2, length=20), [MIXED[0]])
    assert "--dtype" in str(caught.value.hint)
    assert not list_left_behind(model.module)


def test_an_unknown_compressor(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    with pytest.raises(UnknownNameError, match="unknown compressor"):
        run(model, random_calibration(model, rows=1), compressor="awq")


def test_compensation_pays_for_the_whole_model(tiny_model: TinyModel) -> None:
    calibration = random_calibration(loaded(tiny_model("llama")))
    with torch.no_grad():
        dense = loaded(tiny_model("llama"))
        expected = forward(dense, calibration.batches[0]).logits
        errors = []
        for compressor in ("gptq", "nearest"):
            model = loaded(tiny_model("llama"))
            run(model, calibration, [Candidate(bits=3, group_size=16)], compressor)
            logits = forward(model, calibration.batches[0]).logits
            errors.append(float((logits - expected).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_same_input_same_codes(tiny_model: TinyModel) -> None:
    runs = []
    for _ in range(2):
        model = loaded(tiny_model("bert"))
        runs.append(run(model, padded(model), compressor="gptq"))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale)


def test_padding_is_left_out_however_a_family_shapes_its_tokens() -> None:
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = [x[0, 0].tolist(), x[0, 1].tolist(), x[1, 0].tolist()]
    assert select_real_rows(x, mask).tolist() == kept
    assert select_real_rows(x.view(6, 4), mask).tolist() == kept
    assert select_real_rows(x, None).tolist() == x.view(6, 4).tolist()
    assert select_real_rows(x.transpose(0, 1), mask).tolist() == kept  # XLNet's order
    assert select_real_rows(x[:, 0], mask).tolist() == x[:, 0].tolist()  # one row per sentence


def test_the_method_is_taken_from_the_registry(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = gptq.compress

    def counting(problem: LayerProblem) -> LayerSolution:
        calls.append(problem.bits)
        return real(problem)

    monkeypatch.setattr(gptq, "compress", counting)
    model = loaded(tiny_model("opt"))
    layers = run(model, padded(model), compressor="gptq")
    assert calls == [layer.result.candidate.bits for layer in layers]
