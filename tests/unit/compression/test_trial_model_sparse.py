"""The workbench with sparse candidates: the masks that `compress_model` makes."""

from __future__ import annotations

import pytest

from cptq.compression.trial_model import TrialModel
from cptq.numerics.masks import build_magnitude_mask
from cptq.pipeline.trial_model import build_trial_model
from cptq.types import Candidate
from tests.conftest import TinyModel
from tests.unit.compression.test_trial_model import (
    USUAL,
    carried_out,
    cost_of,
    loaded,
    quiet,
    weights,
)

pytestmark = pytest.mark.usefixtures("short_manual")
DENSE = Candidate(bits=16)


@pytest.mark.parametrize("compressor", ["nearest", "gptq"])
@pytest.mark.parametrize("label", ["w4g16-2:4", "w3g16-s50"])
def test_the_inputs_decide_what_stays(tiny_model: TinyModel, compressor: str, label: str) -> None:
    model, calibration = loaded(tiny_model, "llama")
    first = model.units[0]
    before = weights(model)
    choices = {unit.name: DENSE for unit in model.units} | {first.name: Candidate.parse(label)}
    bench = build_trial_model(
        model, calibration, compressor, cost_of(model), choices.values(), seed=0, emit=quiet
    )
    blind = TrialModel(model, compressor, quiet, **USUAL)
    for each in (bench, blind):
        with each.restore_after():
            each.apply_choices(choices)
            gone = {spec.name: weights(model)[spec.name] == 0 for spec in first.layers}
            if each is bench:
                tried = gone
    done = carried_out(model, calibration, choices, compressor)
    for spec in first.layers:
        zeros = int(tried[spec.name].sum())
        assert zeros >= spec.numel // 2
        assert bool((tried[spec.name] == (done[spec.name] == 0)).all())
        if label.endswith("s50"):
            kept = build_magnitude_mask(before[spec.name], 0.5)
            assert bool((gone[spec.name] | kept).all())  # without inputs by magnitude alone
    assert any(not bool((tried[name] == gone[name]).all()) for name in tried)
