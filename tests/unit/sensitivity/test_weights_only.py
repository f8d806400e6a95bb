"""The metrics of the weights alone, against definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError
from cptq.numerics.masks import compute_relative_error
from cptq.sensitivity.effective_rank import compute_effective_rank
from cptq.sensitivity.kurtosis import compute_kurtosis
from cptq.sensitivity.measure import measure, needs_text
from cptq.sensitivity.pq_index import compute_evenness
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.types import Candidate
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded

SHAPES = [(1, 1), (1, 7), (5, 3), (13, 13), (9, 31)]
W3 = Candidate(bits=3, group_size=16)
METRICS = {
    "pq-index": compute_evenness,
    "kurtosis": compute_kurtosis,
    "effective-rank": compute_effective_rank,
}


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) ** 3


@pytest.mark.parametrize("shape", SHAPES)
def test_pq_index_equals_the_ratio_of_norms(shape: tuple[int, int]) -> None:
    w = [abs(float(x)) for x in matrix(shape).flatten()]
    p, q = 0.5, 1.0
    norm_p, norm_q = (sum(x**r for x in w) ** (1 / r) for r in (p, q))
    index = 1 - len(w) ** (1 / q - 1 / p) * norm_p / norm_q
    assert compute_evenness(matrix(shape)) == pytest.approx(1 - index, rel=1e-5)


def test_pq_index_of_known_vectors() -> None:
    assert compute_evenness(torch.full((3, 5), -2.0)) == pytest.approx(1.0)
    one = torch.zeros(4, 5)
    one[2, 2] = 3.0
    assert compute_evenness(one) == pytest.approx(1 / 20)
    assert compute_evenness(torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_kurtosis_equals_the_moments(shape: tuple[int, int]) -> None:
    w = [float(x) for x in matrix(shape).flatten()]
    mean = sum(w) / len(w)
    second, fourth = (sum((x - mean) ** r for x in w) / len(w) for r in (2, 4))
    assert compute_kurtosis(matrix(shape)) == pytest.approx(fourth / second**2, rel=1e-6)


def test_kurtosis_of_known_shapes() -> None:
    assert compute_kurtosis(torch.tensor([[-1.0, 1.0], [1.0, -1.0]])) == pytest.approx(1.0)
    assert compute_kurtosis(torch.ones(3, 3)) == 1.0
    assert compute_kurtosis(torch.linspace(-1, 1, 10001)[None]) == pytest.approx(1.8, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_effective_rank_equals_the_entropy_of_the_spectrum(shape: tuple[int, int]) -> None:
    sigma = np.linalg.svd(matrix(shape).double().numpy(), compute_uv=False)
    shares = [float(s) / float(sigma.sum()) for s in sigma]
    entropy = -sum(p * math.log(p) for p in shares)
    expected = math.exp(entropy) / min(shape)
    assert compute_effective_rank(matrix(shape)) == pytest.approx(expected, rel=1e-6)


def test_effective_rank_of_known_matrices() -> None:
    assert compute_effective_rank(torch.eye(7)[:, torch.randperm(7)]) == pytest.approx(1.0)
    outer = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 6.0))
    assert compute_effective_rank(outer) == pytest.approx(1 / 5, rel=1e-6)
    assert compute_effective_rank(torch.zeros(3, 4)) == 1.0


@pytest.mark.parametrize("arch", ["llama", "bert", "bert-encoder"])
def test_no_text_is_needed_and_scores_follow_the_form(arch: str, tiny_model: TinyModel) -> None:
    model = loaded(tiny_model(arch))
    assert not needs_text(list(METRICS))
    tables = measure(
        model, None, metrics=list(METRICS), candidates=(W3,), seed=0, emit=lambda event: None
    )
    total = sum(unit.numel for unit in model.units)
    for name, table in tables.items():
        assert (table.tokens, table.calibration_fingerprint) == (0, "")
        for unit in model.units:
            W = [get_weight(model.linear(s.name)) for s in unit.layers]
            s = sum(METRICS[name](w) * w.numel() for w in W) / unit.numel
            assert table.per_unit[unit.name] == pytest.approx(s)
            layers = zip(W, unit.layers, strict=True)
            t2 = compute_relative_error(
                [compute_rounding_error(w, spec, W3) for w, spec in layers], W
            )
            expected = s * unit.numel / total * t2
            assert table.scores[unit.name][W3] == pytest.approx(expected, rel=0.02)


def test_without_text_a_metric_that_reads_some_is_refused(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    assert needs_text(["kurtosis", "cca"])
    with pytest.raises(CalibrationError, match="'cca'") as refused:
        measure(
            model, None, metrics=["kurtosis", "cca"], candidates=(W3,), seed=0,
            emit=lambda event: None,
        )  # fmt: skip
    assert "effective-rank" in str(refused.value)
