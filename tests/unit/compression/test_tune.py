"""Tuning: its gradients against autograd in float64, what it may change, and when it keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import Objective, choose_objective
from cptq.calibration.replay import forward
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, set_weight
from cptq.compression import nearest
from cptq.compression import tune as tuning
from cptq.compression.layer import (
    LEAST,
    MOST,
    compress_layer,
    compress_module,
    measure_layer,
    round_layer_scales,
)
from cptq.compression.tune import Tuned, copy_dense, cut_steps
from cptq.compression.tuned_parts import (
    RATES,
    Scales,
    Vector,
    find_free_vectors,
    fold_gradient,
    list_free,
)
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.numerics.float8 import round_to_float8
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16
from cptq.numerics.grid import dequantize_layer
from cptq.numerics.scale_grids import join_rows, split_rows
from cptq.types import Candidate, CompressedLayer, LayerSpec
from tests.conftest import Heard, TinyModel
from tests.quick import keep_quick
from tests.reference.sensitivity import loaded, random_calibration
from tests.reference.tuning import differentiate

#: cycled over the linears: odd groups, every kind of grid, one layer dense
CANDIDATES = (
    Candidate(bits=3, group_size=16),
    Candidate(bits=2, group_size=12, symmetric=False),
    Candidate(bits=3),
    Candidate(bits=16),
    Candidate(bits=4, group_size=8, sparsity=0.5, pattern="unstructured"),
)
THREE = (Candidate(bits=3, group_size=16),)


@dataclass(kw_only=True)
class Case:
    """A compressed model and all that tunes it."""

    model: LoadedModel
    dense: LoadedModel
    layers: list[CompressedLayer]
    batches: list[Batch]
    objective: Objective
    choose: DivergenceFromDense
    judge: DivergenceFromDense
    heard: Heard = field(default_factory=Heard)

    def tune(self, judge: Any = None, **more: Any) -> Tuned:
        wanted: dict[str, Any] = {"steps": 24, "emit": self.heard} | more
        return tuning.tune(
            self.model,
            self.dense,
            self.layers,
            self.batches,
            self.objective,
            self.choose,
            judge or self.judge,
            **wanted,
        )


def build(
    path: object, candidates: Sequence[Candidate] = THREE, *, conv1d: bool = False, rows: int = 8
) -> Case:
    model = loaded(path, conv1d=conv1d)
    objective = choose_objective(model.kind, model.config)
    texts = [
        random_calibration(model, rows=count, length=48, seed=k).batches
        for k, count in enumerate((rows, 8, 8))
    ]
    choose, judge = (DivergenceFromDense(model, x, objective, units=False) for x in texts[1:])
    dense, layers = copy_dense(model), []
    specs = [spec for unit in model.units for spec in unit.layers]
    for spec, candidate in zip(specs, cycle(candidates), strict=False):
        if not candidate.dense:
            asked = model.linear(spec.name), spec, None, candidate, nearest.compress, PACKED_LAYOUT
            layers.append(compress_module(*asked, dtype=model.dtype))
    return Case(
        model=model,
        dense=dense,
        layers=layers,
        batches=cut_steps(texts[0], windows=model.kind == "causal-lm", bos=False),
        objective=objective,
        choose=choose,
        judge=judge,
    )


def snapshot(model: LoadedModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.module.state_dict().items()}


@pytest.mark.parametrize(
    "arch",
    keep_quick(
        ("llama", "gpt2", "opt", "bert", "bert-encoder", "distilbert"),
        *("llama", "opt", "bert", "bert-encoder"),
    ),
)
def test_gradients_are_those_of_autograd_in_float64(arch: str, tiny_model: TinyModel) -> None:
    case = build(tiny_model(arch), CANDIDATES, conv1d=True)
    vectors = find_free_vectors(case.model)
    free = [Scales(case.model, layer, False, 1.0) for layer in case.layers]
    free += [Vector(case.model, name, x, 1.0) for name, x in vectors.items()]
    with tuning._receive_gradients(free):
        teacher = tuning._Teacher(case.dense, case.batches, case.objective)
        reference_RV = teacher.compute_reference(0)
        tuning._backpropagate(case.model, case.batches[0], reference_RV, case.objective)
    by_scale, by_vector = differentiate(
        case.model.module,
        case.dense.module,
        case.layers,
        list(vectors),
        case.batches[0],
        case.objective,
    )
    expected = [g * x.scale.double() for g, x in zip(by_scale, case.layers, strict=True)]
    starts = [x.detach().double() for x in vectors.values()]
    expected += [g * x.square().mean().sqrt() for g, x in zip(by_vector, starts, strict=True)]
    largest = max(float(g.abs().max()) for g in expected)
    for part, gradient in zip(free, expected, strict=True):
        found = torch.zeros_like(part.r) if part.r.grad is None else part.r.grad
        torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-5 * largest)
    assert not any(p.requires_grad or p.grad is not None for p in case.model.module.parameters())


@pytest.mark.parametrize("arch", ["llama", "bert", "bert-encoder"])
def test_the_dense_model_runs_through_its_blocks_once(arch: str, tiny_model: TinyModel) -> None:
    case = build(tiny_model(arch))
    teacher = tuning._Teacher(case.dense, case.batches, case.objective)
    first = [teacher.compute_reference(k).clone() for k in range(len(case.batches))]
    for batch, found in zip(case.batches, first, strict=True):
        expected = case.objective.select_rows(forward(case.dense, batch), batch)
        torch.testing.assert_close(found, case.objective.compute_reference(expected))
    with torch.no_grad():
        for unit in case.dense.units:
            for spec in unit.layers:
                get_weight(case.dense.linear(spec.name)).fill_(torch.nan)
    assert all(torch.equal(teacher.compute_reference(k), x) for k, x in enumerate(first))


def test_the_rate_falls_with_the_inputs_of_a_layer(tiny_model: TinyModel) -> None:
    case = build(tiny_model("llama", hidden_size=96, intermediate_size=192))
    free = list_free(case.model, case.layers, False, 0.5)
    scales = [part for part in free if isinstance(part, Scales)]
    for part, layer in zip(scales, case.layers, strict=True):
        share = {48: 1, 96: 2 / 3, 192: 1 / 3}[layer.spec.shape[1]]
        assert part.rate == pytest.approx(0.5 * math.sqrt(layer.result.weight_error) * share)
    vectors = [part.rate for part in free if not isinstance(part, Scales)]
    mean = sum(part.rate for part in scales) / len(scales)
    assert vectors == pytest.approx([mean] * len(vectors))


def test_the_gradient_of_a_scale_is_a_sum_over_its_group() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = LayerSpec(
        name="a.b", block=0, role="b", kind="linear", shape=(5, 21), dtype="F32"
    )  # fmt: skip
    W_OI, slope_OI = (torch.randn(5, 21, generator=generator) for _ in range(2))
    for candidate in (Candidate(bits=3, group_size=7), Candidate(bits=2, symmetric=False)):
        layer = compress_layer(spec, W_OI, None, candidate, nearest.compress, PACKED_LAYOUT)
        size = 21 // layer.scale.shape[1]
        for o, g in [(o, g) for o in range(5) for g in range(layer.scale.shape[1])]:
            zero = 0 if layer.zero is None else int(layer.zero[o, g])
            columns = range(g * size, g * size + size)
            expected = sum(float(slope_OI[o, i]) * (int(layer.codes[o, i]) - zero) for i in columns)
            found = float(fold_gradient(layer, slope_OI)[o, g])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "arch",
    keep_quick(
        ("llama", "gpt2", "qwen3_moe", "bert", "bert-encoder", "bert-mlm"),
        *("gpt2", "bert", "bert-encoder"),
    ),
)
def test_tuning_brings_a_model_closer_to_the_dense_one(arch: str, tiny_model: TinyModel) -> None:
    case = build(tiny_model(arch), conv1d=True)
    before = case.judge.measure_rows()
    found = case.tune()
    assert found.kept
    assert torch.equal(found.before, before)
    assert torch.equal(found.after, case.judge.measure_rows())
    assert float(found.after.mean()) < 0.97 * float(before.mean())
    assert case.heard.stages == {"tune"}
    moved = 0
    for old, new in zip(case.layers, found.layers, strict=True):
        if "pooler" in new.spec.name and case.objective.kind == "encoder":
            continue  # it has no part in a sentence's embedding
        assert new.codes is old.codes
        assert new.scale.dtype is old.scale.dtype
        assert torch.equal(new.scale.sign(), old.scale.sign())
        moved += not torch.equal(new.scale, old.scale)
        own = get_weight(case.model.linear(new.spec.name))
        assert torch.equal(own, dequantize_layer(new, case.model.dtype))
    assert moved >= len(case.layers) - 1
    vectors = [x for x in find_free_vectors(case.model) if "pooler" not in x]
    assert set(vectors) <= set(found.dense)
    assert found.steps == found.planned == 24
    assert found.in_time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_are_kept_in_the_type_of_the_checkpoint(
    dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    case = build(tiny_model("opt", dtype=dtype))
    before = snapshot(case.model)
    found = case.tune(steps=16)
    assert found.kept
    changed = 0
    for name, vector in find_free_vectors(case.model).items():
        assert torch.equal(vector, vector.to(dtype).float())
        changed += not torch.equal(vector, before[name])
    assert changed > 10
    frozen = set(before) - set(found.dense) - {x.spec.weight_name for x in case.layers}
    assert any("embed" in name for name in frozen)
    assert all(torch.equal(case.model.module.state_dict()[x], before[x]) for x in frozen)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_what_makes_it_worse_is_not_kept(
    rate: float, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(tiny_model("llama"))
    before = snapshot(case.model)
    monkeypatch.setitem(RATES, "token", rate)
    found = case.tune()
    assert not found.kept
    assert found.dense == ()
    assert all(a.scale.equal(b.scale) for a, b in zip(found.layers, case.layers, strict=True))
    assert all(torch.equal(x, before[n]) for n, x in case.model.module.state_dict().items())


def test_the_mean_of_the_latest_states_is_judged_and_the_steps_go_on(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(tiny_model("llama"))
    monkeypatch.setattr(tuning, "AVERAGED", 4)
    part = Scales(case.model, case.layers[0], False, 1.0)
    search = tuning._Search([part], case.choose, math.inf)
    generator = torch.Generator().manual_seed(0)
    path = [0.1 * torch.randn(part.r.shape, generator=generator) for _ in range(7)]
    mean = torch.zeros_like(part.r)
    for k, change in enumerate(path):
        part.r.copy_(change)
        part.load(part.store(part.r))
        search.follow()
        mean += (change - mean) / min(k + 1, 4)
    now = part.layer.scale
    search.look()
    assert torch.equal(part.layer.scale, now)
    torch.testing.assert_close(search.best[0], part.store(mean))
    search.return_to_best()
    assert torch.equal(part.layer.scale, search.best[0])
    assert search.last == pytest.approx(float(case.choose.measure_rows().mean()), rel=1e-9)
    torch.testing.assert_close(part.r, mean)


def test_a_step_that_is_not_finite_is_undone(tiny_model: TinyModel) -> None:
    case = build(tiny_model("llama"))
    part = Scales(case.model, case.layers[0], False, 1.0)
    search = tuning._Search([part], case.choose, math.inf)
    for change, finite in ((torch.nan, False), (0.01, True)):
        part.r.fill_(change)
        part.load(part.store(part.r))
        search.follow()
        search.look()
        assert math.isfinite(search.last) == finite
        search.return_to_best()
    assert torch.equal(part.layer.scale, part.store(torch.full_like(part.r, 0.01)))


def test_too_large_a_rate_is_cut(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(tiny_model("llama"))
    monkeypatch.setitem(RATES, "token", 1.0)
    monkeypatch.setattr(tuning, "CHECK_EVERY", 4)
    found = case.tune(steps=32)
    assert found.kept
    assert float(found.after.mean()) < 0.97 * float(found.before.mean())


def test_what_is_worse_on_the_second_text_is_not_kept(tiny_model: TinyModel) -> None:
    case = build(tiny_model("llama"))
    before = snapshot(case.model)
    rows = iter([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])])
    found = case.tune(judge=SimpleNamespace(measure_rows=lambda: next(rows)))
    assert not found.kept
    assert [float(found.before.mean()), float(found.after.mean())] == [1.5, pytest.approx(1.55)]
    assert all(torch.equal(x, before[n]) for n, x in case.model.module.state_dict().items())


def test_without_a_second_text_the_one_that_chose_is_reported(tiny_model: TinyModel) -> None:
    case = build(tiny_model("llama"))
    before = case.choose.measure_rows()
    found = tuning.tune(
        case.model,
        case.dense,
        case.layers,
        case.batches,
        case.objective,
        case.choose,
        None,
        steps=16,
        emit=case.heard,
    )
    assert found.kept
    assert torch.equal(found.before, before)
    assert torch.equal(found.after, case.choose.measure_rows())


def test_the_same_seed_gives_the_same_bits(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    runs = [build(path, rows=32).tune(seed=seed, steps=16) for seed in (1, 1, 2)]
    first, same, other = ([layer.scale for layer in run.layers] for run in runs)
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))


def ticks(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def test_time_ends_it_and_small_steps_come_last(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which every step takes a second: of 512, 40 fit."""
    case = build(tiny_model("llama"))
    clock = ticks(1.0)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    shares: list[float] = []
    anneal = tuning._Pace.anneal

    def note(self: Any, made: int) -> float:
        shares.append(anneal(self, made))
        return shares[-1]

    monkeypatch.setattr(tuning._Pace, "anneal", note)
    found = case.tune(steps=512, seconds=40.0)
    assert (found.planned, found.in_time) == (512, False)
    assert 30 <= found.steps <= 40
    assert len(shares) == found.steps
    assert shares[0] == 1.0
    assert shares[-1] < 0.1
    assert found.kept


def test_no_time_leaves_the_model_as_it_is(tiny_model: TinyModel) -> None:
    case = build(tiny_model("llama"))
    found = case.tune(seconds=-1.0)
    assert (found.steps, found.in_time, found.kept) == (0, False, False)


def test_the_copy_stays_dense_and_shares_what_stays_as_it_is(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("opt", tied=True))
    before = snapshot(model)
    dense = copy_dense(model)
    positions = model.module.model.decoder.embed_positions.weight
    assert dense.module.model.decoder.embed_positions.weight is positions
    assert dense.module.get_output_embeddings().weight is dense.module.get_input_embeddings().weight
    for unit in model.all_units:
        for spec in unit.layers:
            set_weight(model.linear(spec.name), torch.ones(spec.shape))
    with torch.no_grad():
        for vector in find_free_vectors(model).values():
            vector.add_(1.0)
    assert not torch.equal(model.module.state_dict()[spec.weight_name], before[spec.weight_name])
    assert all(torch.equal(x, before[n]) for n, x in dense.module.state_dict().items())


def test_long_rows_are_cut_and_every_piece_begins_with_the_bos() -> None:
    row = torch.arange(1, 1102)[None]
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    pieces = [x["input_ids"][0].tolist() for x in cut_steps([batch], windows=True, bos=True)]
    assert [len(piece) for piece in pieces] == [368, 368, 367]  # no step on a rest
    assert all(piece[0] == 1 for piece in pieces)
    assert [x for piece in pieces for x in piece[1:]] == list(range(2, 1102))
    plain = [x["input_ids"][0].tolist() for x in cut_steps([batch], windows=True, bos=False)]
    assert [x for piece in plain for x in piece] == list(range(1, 1102))
    whole = cut_steps([batch], windows=False, bos=True)
    assert [x["input_ids"].shape for x in whole] == [(1, 1101)]


def test_short_rows_share_a_step() -> None:
    batches = random_calibration(SimpleNamespace(config=SimpleNamespace(vocab_size=9), kind="x"))
    cut = cut_steps(batches.batches, windows=False, bos=False)
    assert all(x["input_ids"].numel() <= 512 for x in cut)
    assert sum(int(x["attention_mask"].sum()) for x in cut) == batches.tokens


def make_layer(candidate: Candidate, dtype: str, size: float = 1.0) -> CompressedLayer:
    W_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * size
    spec = LayerSpec(name="a.b", block=0, role="b", kind="linear", shape=(6, 64), dtype=dtype)
    layout = PACK_QUANTIZED if candidate.symmetric else PACKED_LAYOUT
    return compress_layer(
        spec, W_OI, None, candidate, nearest.compress, layout, float16_scales=True
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_scales_keep_the_bounds_of_float16(dtype: str, symmetric: bool) -> None:
    layer = make_layer(Candidate(bits=4, group_size=32, symmetric=symmetric), dtype)
    same = round_layer_scales(layer, layer.scale.float(), float16_scales=True)
    assert same.dtype is layer.scale.dtype
    assert torch.equal(same, layer.scale)
    for factor in (1.1137, 1e-9, 1e9, math.inf):
        moved = round_layer_scales(layer, layer.scale.float() * factor, float16_scales=True)
        assert moved.dtype is layer.scale.dtype
        assert fits_float16(moved)
        assert torch.equal(moved.sign(), layer.scale.sign())
        if layer.zero is not None:
            assert fits_float16(compute_minimum(moved, layer.zero, "Q4_1"))
        elif dtype == "BF16" and factor != 1.1137:
            assert float(moved.abs()[0, 0]) == (LEAST if factor < 1 else MOST)
    free = round_layer_scales(layer, layer.scale.float() * 1.1137, float16_scales=False)
    assert torch.equal(free, (layer.scale.float() * 1.1137).to(layer.scale.dtype))


@pytest.mark.parametrize("scales", ["row", "e4m3", "e5m2"])
def test_narrow_scales_stay_what_their_kind_holds(scales: str) -> None:
    W_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    spec = LayerSpec(name="a.b", block=0, role="b", kind="linear", shape=(6, 64), dtype="BF16")
    candidate = Candidate(bits=3, group_size=16, scales=scales)
    layer = compress_layer(spec, W_OI, None, candidate, nearest.compress, PACKED_LAYOUT)
    same = round_layer_scales(layer, layer.scale.float(), float16_scales=False)
    assert torch.equal(same, layer.scale)
    moved = round_layer_scales(layer, layer.scale.float() * 1.37, float16_scales=False)
    assert moved.dtype is layer.scale.dtype
    assert torch.equal(moved.sign(), layer.scale.sign())
    if scales == "row":
        codes_OG, factor_O1 = split_rows(moved, torch.bfloat16)
        assert torch.equal(join_rows(codes_OG, factor_O1), moved)
    else:
        assert torch.equal(round_to_float8(moved, scales).float(), moved)
    assert float((moved / layer.scale - 1.37).abs().max()) < 0.37


def test_errors_are_measured_again() -> None:
    layer = make_layer(Candidate(bits=4, group_size=32), "F32")
    W_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    X_TI = torch.randn(90, 64, generator=torch.Generator().manual_seed(1))
    other = replace(layer, scale=layer.scale * 1.25)
    Q_OI = dequantize_layer(other, torch.float32)
    found = measure_layer(other, W_OI, X_TI.T @ X_TI / 90).result
    assert found.weight_error == pytest.approx(float((W_OI - Q_OI).norm() / W_OI.norm()) ** 2)
    lost, whole = X_TI @ (W_OI - Q_OI).T, X_TI @ W_OI.T
    assert found.output_error == pytest.approx(float(lost.norm() / whole.norm()) ** 2, rel=1e-4)
    assert found.held_out
    unknown = measure_layer(other, W_OI, None).result
    assert (unknown.output_error, unknown.held_out) == (None, False)
