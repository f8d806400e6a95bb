"""GPT-2's Conv1D, whose weights lie (in, out): scored as the same matrix in a linear is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cptq.sensitivity import METRICS
from cptq.types import Candidate
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded
from tests.unit.sensitivity.conftest import Score

CANDIDATES = tuple(Candidate(bits=bits, group_size=16) for bits in (2, 4, 8))


def as_linear(conv: Conv1D) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf)
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def test_every_metric_scores_a_conv1d_as_the_same_linear(
    tiny_model: TinyModel, score: Score
) -> None:
    conv, linear = (loaded(tiny_model("gpt2"), conv1d=True) for _ in range(2))
    assert {layer.kind for unit in conv.units for layer in unit.layers} == {"conv1d"}
    before = {name: value.clone() for name, value in conv.module.state_dict().items()}
    for unit in linear.units:
        for layer in unit.layers:
            linear.module.set_submodule(layer.name, as_linear(linear.linear(layer.name)))
    found, expected = (
        score(model, tuple(METRICS), CANDIDATES, rows=20) for model in (conv, linear)
    )
    for name, table in found.items():
        for unit, row in table.scores.items():
            assert min(row.values()) >= 0, (name, unit)
            assert row == pytest.approx(expected[name].scores[unit], rel=2e-2, abs=1e-7), name
    after = conv.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
