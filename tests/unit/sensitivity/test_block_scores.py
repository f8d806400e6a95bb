"""Scores of whole blocks against whole models in float64."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from cptq.calibration.batches import choose_held_out_tokens, split_held_out
from cptq.calibration.objective import choose_objective
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.masks import prune_by_magnitude
from cptq.sensitivity.block_scores import ALGORITHMS, BlockScores, measure_blocks
from cptq.types import Candidate
from tests.conftest import Heard, TinyModel
from tests.reference import gradients as truth
from tests.reference.sensitivity import loaded, random_calibration
from tests.unit.sensitivity.conftest import Score

KINDS = ("llama", "bert", "bert-encoder")
DRAWS = 3


def measured(model: LoadedModel, heard: Heard, seed: int = 3) -> dict[str, BlockScores]:
    return measure_blocks(model, random_calibration(model), seed=seed, emit=heard, draws=DRAWS)


def held_out(model: LoadedModel) -> list[dict[str, Tensor]]:
    tokens = choose_held_out_tokens(model.parameters, on_cpu=True)
    return split_held_out(random_calibration(model).batches, model.kind, tokens).held_out


@pytest.mark.parametrize("arch", KINDS)
def test_pruning_a_block_prunes_all_of_its_units_at_once(
    arch: str, tiny_model: TinyModel, heard: Heard
) -> None:
    model = loaded(tiny_model(arch))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = measured(model, heard)["PMPQ"]
    assert all(torch.equal(before[n], v) for n, v in model.module.state_dict().items())
    objective = choose_objective(model.kind, model.config)
    assert list(found.scores) == list(range(len(model.block_names)))
    for block, score in found.scores.items():
        specs = [spec for unit in model.units if unit.block == block for spec in unit.layers]
        assert len(specs) >= 6
        curve = []
        for sparsity in (0.1, 0.3, 0.5):
            W = {
                s.name: prune_by_magnitude(get_weight(model.linear(s.name)), sparsity)
                for s in specs
            }
            curve.append(truth.trial(model, held_out(model), objective, W))
        assert found.trials[block] == pytest.approx(curve, rel=1e-3)
        a, b, c = curve
        area = 0.1 * a / 2 + 0.2 * (a + b) / 2 + 0.2 * (b + c) / 2
        assert score == pytest.approx(area, rel=1e-3)


@pytest.mark.parametrize("arch", KINDS)
def test_noise_enters_a_block_with_its_hidden_state(
    arch: str, tiny_model: TinyModel, heard: Heard
) -> None:
    model = loaded(tiny_model(arch))
    objective, rows = choose_objective(model.kind, model.config), held_out(loaded(tiny_model(arch)))
    found = measured(model, heard)["TDMPQ"]
    for block, score in found.scores.items():
        losses = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(3 * DRAWS + draw)
            shapes = [(*row["input_ids"].shape, model.config.hidden_size) for row in rows]
            eps = [torch.randn(shape, generator=generator).double() for shape in shapes]

            def disturb(h: Tensor, at: int, eps: list[Tensor] = eps) -> Tensor:
                return h + 0.1 * h.abs() * eps[at]

            name = model.block_names[block]
            losses.append(truth.disturbed_trial(model, rows, objective, [name], disturb))
        assert found.trials[block] == pytest.approx(losses, rel=1e-3)
        assert score == pytest.approx(fmean(losses), rel=1e-3)
        assert found.spread[block] == pytest.approx(stdev(losses), rel=1e-2)
        assert found.spread[block] > 0


def test_similarity_is_that_of_the_metric(
    tiny_model: TinyModel, heard: Heard, score: Score
) -> None:
    model = loaded(tiny_model("llama", num_hidden_layers=4))
    found = measured(model, heard)
    assert tuple(found) == ALGORITHMS
    tables = score(model, ["cca", "cca-first"], (Candidate(bits=4, group_size=16),), seed=3)
    for ours, table in zip(list(found.values())[:2], tables.values(), strict=True):
        assert ours.scores == table.per_block
        assert (ours.spread, ours.trials) == ({}, {})


def test_a_seed_draws_other_noise_and_the_same_one_the_same(
    tiny_model: TinyModel, heard: Heard
) -> None:
    model = loaded(tiny_model("llama"))
    first, again, other = (measured(model, heard, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["PMPQ"] == other["PMPQ"]
    assert not set(first["TDMPQ"].trials[0]) & set(other["TDMPQ"].trials[0])
    assert heard.stages >= {"PMPQ", "TDMPQ"}
