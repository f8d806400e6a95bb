"""Divergences of single changes against whole forward passes."""

from __future__ import annotations

import pytest
import torch

from cptq.calibration.batches import count_tokens, split_held_out
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.weights import get_weight, replace_weight
from cptq.errors import CalibrationError
from tests.conftest import TinyModel
from tests.reference import gradients as truth
from tests.reference.sensitivity import loaded, random_calibration

ARCHITECTURES = ("llama", "opt", "gpt_neox", "bert", "distilbert", "bert-encoder", "bert-mlm")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_trial_equals_a_whole_forward_pass(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, objective)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    for unit in (model.units[0], model.units[-1]):
        name = unit.layers[-1].name
        module = model.linear(name)
        W = get_weight(module) * 0.8
        ours = divergence.measure_unit(unit, {name: W})
        with torch.no_grad():
            dense = objective.compute_reference(truth.judged(model, model.module, rows, objective))
            with replace_weight(module, W):
                other = truth.judged(model, model.module, rows, objective)
        expected = objective.compute_divergence(dense, other).mean()
        assert ours == pytest.approx(float(expected), rel=1e-5)
        assert ours > 0
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    assert divergence.trials == 2


@pytest.mark.parametrize("arch", ["llama", "bert", "bert-encoder"])
def test_many_layers_changed_at_once_equal_a_model_with_those_weights(
    arch: str, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, objective)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    names = [spec.name for unit in model.units for spec in unit.layers]
    weights = {name: get_weight(model.linear(name)) * 0.9 for name in names}
    expected = truth.trial(model, rows, objective, weights)
    assert divergence.measure_layers(weights) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())


def test_a_part_equals_its_batches_alone_whatever_the_memory(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    objective = choose_objective(model.kind, model.config)
    rows = random_calibration(model, rows=6, length=12).batches
    assert len(rows) > 1
    whole = DivergenceFromDense(model, rows, objective, units=False)
    part, alone = (
        whole.take_part(count_tokens(rows[:1])),
        DivergenceFromDense(model, rows[:1], objective, units=False),
    )
    name = model.units[0].layers[0].name
    with replace_weight(model.linear(name), get_weight(model.linear(name)) * 0.8):
        found_R = part.measure_rows()
        assert torch.equal(found_R, alone.measure_rows())
        assert torch.equal(found_R, whole.measure_rows()[: len(found_R)])
        # as where one block at a time is in memory
        assert torch.equal(found_R, torch.cat(part._measure_parts(part._run_together(None))))
    assert float(found_R.mean()) > 0
    assert (part.tokens, part.samples) == (alone.tokens, alone.samples)
    assert torch.equal(part.window_R, alone.window_R)
    assert whole.tokens > part.tokens


def test_disturbed_readers_of_one_tensor_read_one_disturbance(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, choose_objective(model.kind, model.config))
    unit = model.units[0]
    first = divergence.measure_input_noise(unit, 0.1, seed=0)
    seen: list[torch.Tensor] = []
    handles = [
        model.linear(spec.name).register_forward_hook(lambda m, args, out: seen.append(args[0]))
        for spec in unit.layers
    ]
    assert divergence.measure_input_noise(unit, 0.1, seed=0) == first
    assert len(seen) == 3 * len(rows)
    assert all(torch.equal(seen[0], x) for x in seen[:3])
    for handle in handles:
        handle.remove()
    assert divergence.measure_input_noise(unit, 0.1, seed=1) != first
    assert divergence.measure_input_noise(unit, 0.0, seed=0) == 0.0
    assert divergence.measure_input_noise(unit, 0.2, seed=0) == pytest.approx(4 * first, rel=0.4)
    hooks = [len(model.linear(spec.name)._forward_pre_hooks) for spec in unit.layers]
    assert hooks == [0, 0, 0]


def test_no_change_is_no_divergence(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, choose_objective(model.kind, model.config))
    for unit in model.units:
        weights = {s.name: get_weight(model.linear(s.name)).clone() for s in unit.layers}
        assert divergence.measure_unit(unit, weights) == 0.0


def test_weights_come_back_after_a_failed_trial(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, choose_objective(model.kind, model.config))
    unit = model.units[0]
    spec = unit.layers[0]
    W = get_weight(model.linear(spec.name)).clone()
    with pytest.raises(CalibrationError, match="qkv"):
        divergence.measure_unit(unit, {spec.name: torch.full_like(W, float("nan"))})
    assert torch.equal(get_weight(model.linear(spec.name)), W)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_noise_before_a_block_is_gone_afterwards(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    rows = split_held_out(random_calibration(model).batches, model.kind, 200).held_out
    divergence = DivergenceFromDense(model, rows, choose_objective(model.kind, model.config))
    unit = model.units[0]
    assert unit.block == 0
    weights = {s.name: get_weight(model.linear(s.name)) * 0.9 for s in unit.layers}
    first = divergence.measure_block_noise(0, 0.1, seed=0)
    assert divergence.measure_block_noise(0, 0.1, seed=0) == first > 0
    assert divergence.measure_block_noise(0, 0.1, seed=1) != first
    assert divergence.measure_block_noise(0, 0.0, seed=0) == 0.0
    assert divergence.measure_layers({}, 0) == 0.0
    assert divergence.measure_layers(weights, 0) == divergence.measure_unit(unit, weights) > 0
    with pytest.raises(CalibrationError, match="block 1"):
        divergence.measure_block_noise(1, float("nan"), seed=0)
    assert divergence.measure_layers({}, 1) == 0.0
