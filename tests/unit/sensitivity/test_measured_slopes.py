"""Slopes measured by weight noise, input noise and pruning, against whole models in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import choose_held_out_tokens, split_held_out
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.masks import compute_relative_error, prune_by_magnitude
from cptq.sensitivity import linearity, perturbation, pruning
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.types import Candidate, SensitivityTable
from tests.conftest import TinyModel
from tests.reference import gradients as truth
from tests.reference.sensitivity import loaded, random_calibration
from tests.unit.sensitivity.conftest import Score

W2, W4 = (Candidate(bits=bits, group_size=16) for bits in (2, 4))
KINDS = ("llama", "bert", "bert-encoder")


def held_out(model: LoadedModel) -> list[dict[str, Tensor]]:
    tokens = choose_held_out_tokens(model.parameters, on_cpu=True)
    return split_held_out(random_calibration(model).batches, model.kind, tokens).held_out


def follows_its_slope(table: SensitivityTable, model: LoadedModel) -> None:
    """score(c) = per_unit t^2(c), t^2 of all rows, of which the score has seen 64."""
    for unit in model.units:
        W = [get_weight(model.linear(s.name)) for s in unit.layers]
        for candidate in (W2, W4):
            layers = zip(W, unit.layers, strict=True)
            t2 = compute_relative_error(
                [compute_rounding_error(w, s, candidate) for w, s in layers], W
            )
            expected = table.per_unit[unit.name] * t2
            assert table.scores[unit.name][candidate] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("arch", KINDS)
def test_linearity_equals_its_definition(arch: str, tiny_model: TinyModel, score: Score) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    table = score(model, ["linearity"], (W2, W4), seed=3)["linearity"]
    follows_its_slope(table, model)
    for index in (0, len(model.units) - 1):
        unit = model.units[index]
        draw = torch.Generator().manual_seed(3 + index)
        weights = {}
        for spec in unit.layers:
            W = get_weight(model.linear(spec.name)).double()
            size = sum(float(w) ** 2 for w in W.flatten()) / W.numel()
            eps = torch.randn(W.shape, generator=draw).double()
            weights[spec.name] = W + (linearity.NOISE * size) ** 0.5 * eps
        loss = truth.trial(model, held_out(model), objective, weights)
        assert table.per_unit[unit.name] == pytest.approx(loss / linearity.NOISE, rel=1e-3)


def test_the_noise_has_the_size_asked_for() -> None:
    W = torch.randn(301, 205, generator=torch.Generator().manual_seed(0)) * 7
    noisy = linearity.add_noise(W, 0.02, torch.Generator().manual_seed(1))
    assert compute_relative_error([noisy - W], [W]) == pytest.approx(0.02, rel=0.03)
    assert float((noisy - W).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("arch", KINDS)
def test_perturbation_equals_its_definition(arch: str, tiny_model: TinyModel, score: Score) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    table = score(model, ["perturbation"], (W2, W4), seed=3)["perturbation"]
    follows_its_slope(table, model)
    rows = held_out(model)
    for index in (0, 1, len(model.units) - 1):
        unit = model.units[index]
        draw = torch.Generator().manual_seed(3 + index)
        width = unit.layers[0].shape[1]
        eps = [torch.randn(*_shape(row, model, unit.role), width, generator=draw) for row in rows]

        def disturb(x: Tensor, batch: int, eps: list[Tensor] = eps) -> Tensor:
            return x + perturbation.NOISE * x.abs() * eps[batch].view(x.shape).double()

        names = [spec.name for spec in unit.layers]
        loss = truth.disturbed_trial(model, rows, objective, names, disturb)
        expected = loss / perturbation.NOISE**2
        assert table.per_unit[unit.name] == pytest.approx(expected, rel=1e-3)


def _shape(row: dict[str, Tensor], model: LoadedModel, role: str) -> tuple[int, ...]:
    """All tokens; a pooler or a head reads one per row."""
    rows, tokens = row["input_ids"].shape
    return (rows, tokens) if model.kind == "causal-lm" or role != "pooler" else (rows,)


@pytest.mark.parametrize("arch", KINDS)
def test_pruning_equals_its_definition(arch: str, tiny_model: TinyModel, score: Score) -> None:
    model = loaded(tiny_model(arch))
    objective = choose_objective(model.kind, model.config)
    table = score(model, ["pruning"], (W2, W4), seed=3)["pruning"]
    follows_its_slope(table, model)
    unit = model.units[0]
    W = {s.name: get_weight(model.linear(s.name)).clone() for s in unit.layers}
    curve, slopes = [], []
    for sparsity in pruning.SPARSITIES:
        pruned = {name: prune_by_magnitude(w, sparsity) for name, w in W.items()}
        curve.append(truth.trial(model, held_out(model), objective, pruned))
        lost = sum(float((W[n] - pruned[n]).double().square().sum()) for n in W)
        slopes.append(curve[-1] * sum(float(w.double().square().sum()) for w in W.values()) / lost)
    assert table.details["curve"][unit.name] == pytest.approx(curve, rel=1e-3)
    assert table.per_unit[unit.name] == pytest.approx(sum(slopes) / 3, rel=1e-3)
    a, b, c = curve
    by_hand = 0.1 * a / 2 + 0.2 * (a + b) / 2 + 0.2 * (b + c) / 2
    assert table.details["area"][unit.name] == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("arch", ["llama", "bert-encoder"])
def test_the_whole_model_is_pruned_for_its_essential_sparsity(
    arch: str, tiny_model: TinyModel, score: Score
) -> None:
    model = loaded(tiny_model(arch))
    table = score(model, ["pruning"], (W2, W4), seed=3)["pruning"]
    curve = {float(p): loss for p, loss in table.details["whole_model_curve"].items()}
    found = table.details["essential_sparsity"]
    assert set(pruning.WHOLE_MODEL_SPARSITIES) <= set(curve)
    assert found == pruning.find_essential_sparsity(curve)
    if found is not None:
        assert {round(found - 0.1, 2), round(found - 0.05, 2)} & set(curve)
    layers = [spec.name for unit in model.units for spec in unit.layers]
    pruned = {name: prune_by_magnitude(get_weight(model.linear(name)), 0.3) for name in layers}
    loss = truth.trial(model, held_out(model), choose_objective(model.kind, model.config), pruned)
    assert curve[0.3] == pytest.approx(loss, rel=1e-3)


def test_area_is_the_trapezoids() -> None:
    area = pruning.integrate_curve((0.3, 0.5), (2.0, 6.0))
    assert area == pytest.approx(0.3 * 1.0 + 0.2 * 4.0)
