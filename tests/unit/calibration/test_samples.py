"""The sampling pass against autograd on the same model."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import cptq.calibration.samples as sampling
from cptq.calibration.batches import split_batches, split_held_out
from cptq.calibration.objective import choose_objective
from cptq.calibration.recorder import LayerActivations, LayerSample, SampleRequest
from cptq.calibration.replay import forward
from cptq.calibration.row_sampler import RowSampler
from cptq.calibration.samples import SamplePass, sample_blocks
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight, replace_weight
from cptq.compression.streams import measure_head_moment
from cptq.errors import CalibrationError
from cptq.types import Notice, Progress
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded, random_calibration
from tests.reference.whole_passes import sample_linears

ALL = SampleRequest(gradients=True, moments=True, activations=40)
ARCHITECTURES = (
    "llama", "opt", "gpt2", "gpt_neox", "qwen3_moe", "bert", "bert-encoder", "bert-mlm", "mpnet",
)  # fmt: skip


@dataclass
class Samples:
    """What a pass gave, all blocks together."""

    layers: dict[str, LayerSample]
    activations: dict[str, LayerActivations]
    done: SamplePass


def collect_samples(*given: Any, **options: Any) -> Samples:
    """Run a pass to its end and keep everything."""
    found = Samples({}, {}, sample_blocks(*given, **options))
    for samples in found.done:
        found.layers |= samples.layers
        found.activations |= samples.activations
    return found


def sampled(model: LoadedModel, wants: SampleRequest = ALL, **options: int) -> Samples:
    objective = choose_objective(model.kind, model.config)
    fit = split_held_out(random_calibration(model).batches, model.kind, 200).fit
    options = {"seed": 3} | options
    return collect_samples(model, fit, objective, wants, emit=lambda event: None, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_block_by_block_equals_one_pass_through_the_whole_model(
    arch: str, tiny_model: TinyModel
) -> None:
    """All tokens kept: inputs, gradients, moments and scales of every linear, of two batches."""
    model = loaded(tiny_model(arch), conv1d=True)
    objective = choose_objective(model.kind, model.config)
    batches = random_calibration(model, rows=7, length=17).batches
    samples = collect_samples(
        model, batches, objective, ALL, seed=3, emit=lambda event: None, keep=10_000
    )
    whole, rows = sample_linears(model, batches, objective, seed=3)
    assert set(samples.layers) == set(samples.activations) == set(whole)
    assert samples.done.output_rows == rows
    assert len(samples.done.block_outputs) == len(model.block_names)
    for name, truth in whole.items():
        ours = samples.layers[name]
        assert ours.g_TO is not None
        assert ours.moment is not None
        torch.testing.assert_close(ours.x_TI, torch.cat(truth.x))
        torch.testing.assert_close(ours.g_TO, torch.cat(truth.g), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.moment.mean_II.double(), truth.moment, rtol=1e-4, atol=1e-5)
        assert ours.scale == pytest.approx(truth.seen / (len(ours.x_TI) * rows))


@pytest.mark.parametrize("arch", ["llama", "bert", "qwen3_moe"])
def test_moments_alone_are_those_of_a_pass_with_gradients(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    alone, among = (sampled(model, SampleRequest(moments=True, gradients=g)) for g in (False, True))
    assert set(alone.layers) == set(among.layers)
    for name, layer in alone.layers.items():
        other = among.layers[name].moment
        assert layer.moment is not None
        assert other is not None
        assert layer.moment.tokens == other.tokens
        torch.testing.assert_close(layer.moment.mean_II, other.mean_II)


@pytest.mark.slow
def test_the_fisher_measures_the_kl_in_nats(tiny_model: TinyModel) -> None:
    """1/2 E (sum_t g_t . dW x_t)^2 over many directions is the divergence of a small change."""
    model = loaded(tiny_model("llama"))
    objective = choose_objective(model.kind, model.config)
    batch = random_calibration(model, rows=1, length=24).batches[0]
    spec = model.units[2].layers[0]
    W = get_weight(model.linear(spec.name)).clone()
    dW = 0.01 * torch.randn(W.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        dense = objective.compute_reference(objective.select_rows(forward(model, batch), batch))
        with replace_weight(model.linear(spec.name), W + dW):
            changed = objective.select_rows(forward(model, batch), batch)
    kl = float(objective.compute_divergence(dense, changed).mean())
    squares = []
    for seed in range(300):
        samples = collect_samples(
            model,
            [batch],
            objective,
            SampleRequest(gradients=True),
            seed=seed,
            emit=lambda event: None,
        )
        row = samples.layers[spec.name]
        squares.append(float((row.g_TO * (row.x_TI @ dW.T)).sum()) ** 2)
    assert sum(squares) / len(squares) / 2 / 24 == pytest.approx(kl, rel=0.25)


def test_logits_made_part_by_part_give_the_same_gradients(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny_model("llama"))
    rows = split_batches(random_calibration(model, rows=3, length=17).batches, 1)
    objective = choose_objective(model.kind, model.config)
    given = model, rows, objective, SampleRequest(gradients=True)
    whole = collect_samples(*given, seed=3, emit=lambda event: None, head=True)
    monkeypatch.setattr(sampling, "LOGITS", 5 * int(model.config.vocab_size))
    asked: list[int] = []
    select = type(objective).select_rows

    def count(self: Any, output: Any, *more: Any) -> torch.Tensor:
        asked.append(output.logits.shape[1])
        return select(self, output, *more)

    monkeypatch.setattr(type(objective), "select_rows", count)
    parts = collect_samples(*given, seed=3, emit=lambda event: None, head=True)
    assert asked == 3 * [5, 5, 5, 2]
    assert parts.done.output_rows == whole.done.output_rows == 3 * 17
    for name, sample in whole.layers.items():
        assert sample.g_TO is not None
        torch.testing.assert_close(parts.layers[name].g_TO, sample.g_TO, rtol=1e-4, atol=1e-6)
        assert sample.g_TO.abs().sum() > 0


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_head_is_given_is_summed_on_the_way(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    model = loaded(tiny_model("llama"))
    batches = random_calibration(model, rows=3, length=17).batches
    rows = batches if padded else split_batches(batches, 1)
    if padded:
        rows[0]["attention_mask"][-1, 9:] = 0
    expected_II = measure_head_moment(model, rows)
    monkeypatch.setattr(sampling, "LOGITS", 5 * int(model.config.vocab_size))
    objective = choose_objective(model.kind, model.config)
    given = model, rows, objective, SampleRequest(gradients=True)
    found = collect_samples(*given, seed=3, emit=lambda event: None, head=True).done.head_moment
    assert found is not None
    assert found.tokens == 3 * 17 - 8 * padded
    torch.testing.assert_close(found.mean_II, expected_II)


def test_same_seed_same_rows_and_another_seed_others(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    name = model.units[0].layers[0].name
    first, again, other = (sampled(model, seed=s, keep=50).layers[name] for s in (1, 1, 2))
    assert torch.equal(first.x_TI, again.x_TI)
    assert torch.equal(first.g_TO, again.g_TO)
    assert not torch.equal(first.x_TI, other.x_TI)


def test_the_number_of_rows_is_kept_to(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("bert"))
    samples = sampled(model, keep=37)
    assert {len(layer.x_TI) for layer in samples.layers.values()} == {37}
    assert {len(block) for block in samples.done.block_outputs} == {37}  # asked for 40
    assert {len(view.y_TO) for view in samples.activations.values()} == {37}
    assert samples.layers[model.units[0].layers[0].name].scale == pytest.approx(
        samples.done.tokens / (37 * samples.done.output_rows)
    )


def test_a_shared_input_is_kept_once(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    samples = sampled(model)
    qkv = [samples.layers[spec.name] for spec in model.units[0].layers]
    assert len(qkv) == 3
    assert all(layer.x_TI is qkv[0].x_TI for layer in qkv)
    assert all(layer.moment is qkv[0].moment for layer in qkv)


def test_forward_only_computes_no_gradient_and_leaves_no_trace(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("bert"))
    before = [p.requires_grad for p in model.module.parameters()]
    for parameter in list(model.module.parameters())[:3]:
        parameter.requires_grad_(True)
    samples = sampled(model, SampleRequest(activations=40))
    assert all(layer.g_TO is None and layer.moment is None for layer in samples.layers.values())
    after = [p.requires_grad for p in model.module.parameters()]
    assert after == [True] * 3 + before[3:]
    assert all(p.grad is None for p in model.module.parameters())
    assert all(not m._forward_hooks for m in model.module.modules())


def test_memory_caps_the_rows_and_says_so(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    objective = choose_objective(model.kind, model.config)
    fit = split_held_out(random_calibration(model).batches, model.kind, 200).fit
    events: list[object] = []
    samples = collect_samples(
        model, fit, objective, ALL, seed=0, emit=events.append, memory_bytes=100_000
    )
    rows = len(samples.layers[model.units[0].layers[0].name].x_TI)
    assert rows < 100
    notices = [event for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert f"{rows} token rows" in notices[0].message
    assert any(isinstance(event, Progress) for event in events)


def test_a_layer_called_twice_keeps_the_rows_of_both_calls(tiny_model: TinyModel) -> None:
    """Gradients arrive in the reverse order of the calls: each goes with its own input."""
    model = loaded(tiny_model("llama"))
    model.module.model.layers[1].mlp = model.module.model.layers[0].mlp
    object.__setattr__(
        model, "units", tuple(u for u in model.units if "layers.1.mlp" not in u.name)
    )
    name = "model.layers.0.mlp.down_proj"
    batch = random_calibration(model, rows=1, length=9).batches[0]
    objective = choose_objective(model.kind, model.config)
    samples = collect_samples(
        model, [batch], objective, SampleRequest(gradients=True), seed=0, emit=lambda event: None
    )
    sample = samples.layers[name]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        calls.append((args[0], output))

    weight = model.linear(name).weight.requires_grad_(True)
    handle = model.linear(name).register_forward_hook(look)
    answer = objective.select_rows(forward(model, batch), batch)
    handle.remove()
    answer.backward(objective.draw_direction(answer, torch.Generator().manual_seed(1)))
    weight.requires_grad_(False)
    torch.testing.assert_close(sample.x_TI, torch.cat([x[0] for x, _ in calls]).detach())
    expected = torch.cat([y.grad[0] for _, y in calls])
    torch.testing.assert_close(sample.g_TO, expected, rtol=1e-4, atol=1e-5)


def test_infinite_activations_name_the_layer(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    model.module.model.layers[1].mlp.gate_proj.weight.data.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj"):
        sampled(model)


def whole(model: LoadedModel, request: SampleRequest) -> Samples:
    """Samples of all of the calibration text."""
    batches = random_calibration(model).batches
    objective = choose_objective(model.kind, model.config)
    return collect_samples(model, batches, objective, request, seed=3, emit=lambda event: None)


@pytest.mark.parametrize("few", [1, 7, 100])
def test_activation_rows_are_spread_over_all_rows_drawn(few: int) -> None:
    masks = [torch.ones(2, width, dtype=torch.bool) for width in (5, 1, 9, 16)]
    rows = RowSampler(masks, 0, 30, few)
    drawn: list[int] = []
    viewed: list[int] = []
    for batch, mask in enumerate(masks):
        drawn += [100 * batch + int(row) for row in rows.get_rows(batch, mask.numel())]
        viewed += [100 * batch + int(row) for row in rows.get_few(batch, mask.numel())]
    assert len(drawn) == 30
    wanted = torch.linspace(0, 29, min(few, 30)).round().long().tolist()
    assert viewed == [drawn[place] for place in wanted]


def test_padding_is_not_drawn_and_other_lengths_have_rows_of_their_own() -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    rows = RowSampler([mask], 0, 3, 3)
    assert rows.get_rows(0, 8).tolist() == [0, 1, 4]
    assert rows.get_rows(0, 2).tolist() == [0, 1]
    assert rows.get_few(0, 2).tolist() == [0, 1]


def test_rows_of_other_lengths_depend_on_seed_batch_and_length_alone() -> None:
    """Not on what was asked for before: blocks run in any order."""
    masks = [torch.ones(4, 20, dtype=torch.bool)] * 3
    asked = [(batch, length) for batch in range(3) for length in (50, 51, 80)]
    first, again = RowSampler(masks, 0, 60, 0), RowSampler(masks, 0, 60, 0)
    found = {place: first.get_rows(*place).tolist() for place in asked}
    assert {place: again.get_rows(*place).tolist() for place in reversed(asked)} == found
    assert len({tuple(rows) for rows in found.values()}) == len(asked)
    assert RowSampler(masks, 1, 60, 0).get_rows(0, 50).tolist() != found[0, 50]


@pytest.mark.parametrize("arch", ["llama", "opt", "bert", "mpnet", "gpt2"])
def test_activations_hold_each_layers_inputs_and_outputs(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    samples = whole(model, SampleRequest(activations=25))
    for unit in model.units:
        for spec in unit.layers:
            view = samples.activations[spec.name]
            module = model.linear(spec.name)
            expected = view.x_TI @ get_weight(module).T
            if module.bias is not None:
                expected += module.bias
            torch.testing.assert_close(view.y_TO, expected, rtol=1e-4, atol=1e-5)
            assert len(view.x_TI) == 25


def test_activations_are_the_same_whatever_else_is_kept(tiny_model: TinyModel) -> None:
    """Alone they need no backward pass and no output head; the tokens are the same ones."""
    model = loaded(tiny_model("llama"))
    alone = whole(model, SampleRequest(activations=25))
    among = whole(model, SampleRequest(activations=25, gradients=True, moments=True))
    for name, view in alone.activations.items():
        torch.testing.assert_close(view.x_TI, among.activations[name].x_TI)
        torch.testing.assert_close(view.y_TO, among.activations[name].y_TO)
    torch.testing.assert_close(alone.done.block_outputs, among.done.block_outputs)
    assert all(len(layer.x_TI) == 0 for layer in alone.layers.values())
    assert all(len(layer.x_TI) > 25 for layer in among.layers.values())


def test_an_output_that_is_nan_names_the_layer(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    last = model.units[-1].layers[-1].name
    get_weight(model.linear(last))[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=re.escape(last)):
        whole(model, SampleRequest(activations=25))


@pytest.mark.parametrize("gradients", [True, False])
def test_the_samples_of_a_block_are_gone_before_the_next_runs(
    gradients: bool, tiny_model: TinyModel
) -> None:
    """Though the caller's loop still holds what it was given."""
    model = loaded(tiny_model("llama", num_hidden_layers=4))
    batches = random_calibration(model).batches
    request = SampleRequest(gradients=gradients, moments=True, activations=9)
    objective = choose_objective(model.kind, model.config)
    kept: list[weakref.ref[Any]] = []
    left: list[int] = []

    def count(*_: object) -> None:
        left.append(sum(there() is not None for there in kept))

    for block in model.blocks:
        block.register_forward_pre_hook(count)
    blocks = []
    for samples in sample_blocks(
        model, batches, objective, request, seed=0, emit=lambda event: None
    ):
        blocks.append(samples.units[0].block)
        layers, few = samples.layers.values(), samples.activations.values()
        kept += [weakref.ref(layer.x_TI) for layer in layers]
        kept += [weakref.ref(layer.g_TO) for layer in layers if layer.g_TO is not None]
        kept += [weakref.ref(layer.moment) for layer in layers if layer.moment is not None]
        kept += [weakref.ref(view.y_TO) for view in few]
        assert any(there() is not None for there in kept)
        del layers, few
    assert blocks == ([3, 2, 1, 0] if gradients else [0, 1, 2, 3])
    assert len(left) > 4
    assert not any(left)
