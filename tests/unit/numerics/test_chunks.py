"""On a GPU operations take more at once, and give what they give in parts."""

from __future__ import annotations

import pytest
import torch

from cptq.calibration.objective import Objective
from cptq.numerics.chunks import ON_DEVICE, choose_chunk
from cptq.numerics.grid import fit_grid
from cptq.numerics.reproducible import PART, compute_total


def test_a_gpu_takes_more_at_once(gpu: None) -> None:
    x = torch.ones(3)
    assert choose_chunk(x, 8) == 8
    assert choose_chunk(x.cuda(), 8) == ON_DEVICE
    assert choose_chunk(x.cuda(), 2 * ON_DEVICE) == 2 * ON_DEVICE


def test_results_are_those_of_parts(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptq.calibration.objective.CHUNK", 100)
    monkeypatch.setattr("cptq.numerics.grid.CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    z_RV, other_RV = (torch.randn(7, 48, generator=generator) for _ in range(2))
    objective = Objective(kind="causal-lm", form="classes", row="token")
    dense_RV = objective.compute_reference(z_RV)
    found = objective.compute_divergence(dense_RV.cuda(), other_RV.cuda())
    assert torch.equal(found.cpu(), objective.compute_divergence(dense_RV, other_RV))
    scale_OG, _ = fit_grid(z_RV.cuda(), 3, 16)
    assert torch.equal(scale_OG.cpu(), fit_grid(z_RV, 3, 16)[0])
    X = torch.randn(3 * PART + 7, generator=generator)
    assert float(compute_total(X.cuda())) == pytest.approx(float(X.double().sum()), rel=1e-4)
