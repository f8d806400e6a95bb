"""Views: the same tokens of every layer and block, and nothing but the body run for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cptq.calibration.objective import objective_for
from cptq.calibration.positions import Positions
from cptq.calibration.samples import Samples, Wants, collect_samples
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError
from tests.reference.sensitivity import loaded, random_calibration

TinyModel = Callable[..., Path]


def sampled(model: LoadedModel, wants: Wants) -> Samples:
    batches = random_calibration(model).batches
    objective = objective_for(model.kind, model.config)
    return collect_samples(model, batches, objective, wants, seed=3, emit=lambda _: None)


@pytest.mark.parametrize("few", [1, 7, 100])
def test_few_are_spread_over_all_that_are_drawn(few: int) -> None:
    quotas = [5, 0, 9, 16]
    positions = Positions(0, sum(quotas), few)
    drawn: list[int] = []
    viewed: list[int] = []
    for index, quota in enumerate(quotas):
        positions.choose(torch.ones(2, 20, dtype=torch.bool), quota)
        drawn += [100 * index + int(row) for row in positions.of(40)]
        viewed += [100 * index + int(row) for row in positions.few(40)]
    count = min(few, 30)
    wanted = torch.linspace(0, 29, count).round().long().tolist()
    assert viewed == [drawn[place] for place in wanted]


def test_padding_is_not_drawn_and_other_lengths_have_rows_of_their_own() -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    positions = Positions(0, 3, 3)
    positions.choose(mask, 3)
    assert positions.of(8).tolist() == [0, 1, 4]
    assert positions.of(2).tolist() == [0, 1]
    assert positions.few(2).tolist() == [0, 1]


@pytest.mark.parametrize("arch", ["llama", "opt", "bert", "mpnet", "gpt2"])
def test_outputs_are_the_layers_of_the_inputs(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    samples = sampled(model, Wants(views=25))
    for unit in model.units:
        for spec in unit.layers:
            view = samples.views[spec.name]
            module = model.linear(spec.name)
            expected = view.x_TI @ get_weight(module).T
            if module.bias is not None:
                expected += module.bias
            torch.testing.assert_close(view.y_TO, expected, rtol=1e-4, atol=1e-5)
            assert len(view.x_TI) == 25


def test_they_are_the_same_whatever_else_is_kept(tiny_model: TinyModel) -> None:
    """Alone they need no backward pass and no output head; the tokens are the same ones."""
    model = loaded(tiny_model("llama"))
    alone = sampled(model, Wants(views=25))
    among = sampled(model, Wants(views=25, gradients=True, moments=True))
    for name, view in alone.views.items():
        torch.testing.assert_close(view.x_TI, among.views[name].x_TI)
        torch.testing.assert_close(view.y_TO, among.views[name].y_TO)
    torch.testing.assert_close(alone.blocks, among.blocks)
    assert all(len(layer.x_TI) == 0 for layer in alone.layers.values())
    assert all(len(layer.x_TI) > 25 for layer in among.layers.values())


def test_nan_is_named(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    last = model.units[-1].layers[-1].name
    get_weight(model.linear(last))[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=f"the output of layer {last} holds NaN"):
        sampled(model, Wants(views=25))
