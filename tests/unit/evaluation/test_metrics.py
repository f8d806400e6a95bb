from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptq.evaluation.metrics import (
    METRICS,
    accuracy,
    bootstrap_standard_error,
    estimate_standard_error,
    is_constant,
    matthews,
    pearson,
    spearman,
)


def ranks(values: list[float]) -> list[float]:
    """Mean rank of equal values, by counting."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def naive_pearson(a: list[float], b: list[float]) -> float:
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def test_accuracy_by_hand() -> None:
    assert accuracy(np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 1, 1])) == 0.75


def test_matthews_by_hand() -> None:
    """6 true positives, 3 true negatives, 1 false positive, 2 false negatives."""
    labels = np.array([1.0] * 6 + [0.0] * 3 + [0.0] + [1.0] * 2)
    predictions = np.array([1.0] * 6 + [0.0] * 3 + [1.0] + [0.0] * 2)
    expected = (6 * 3 - 1 * 2) / math.sqrt((6 + 1) * (6 + 2) * (3 + 1) * (3 + 2))
    assert matthews(labels, predictions) == pytest.approx(expected)
    assert matthews(labels, np.ones(12)) == 0


def test_correlations_by_hand_with_ties() -> None:
    a, b = [0.0, 1.0, 1.0, 4.0, 5.0, 2.5], [0.1, 0.3, 0.2, 0.9, 0.2, 0.2]
    assert pearson(np.array(a), np.array(b)) == pytest.approx(naive_pearson(a, b))
    assert spearman(np.array(a), np.array(b)) == pytest.approx(naive_pearson(ranks(a), ranks(b)))
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 10, 100])) == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=20))
def test_correlations_equal_the_definition(pairs: list[tuple[int, int]]) -> None:
    a, b = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert pearson(np.array(a), np.array(b)) == spearman(np.array(a), np.array(b)) == 0
        return
    assert pearson(np.array(a), np.array(b)) == pytest.approx(naive_pearson(a, b), abs=1e-9)
    expected = naive_pearson(ranks(a), ranks(b))
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-9)


def test_a_constant_side_is_told() -> None:
    assert is_constant(np.array([2.0, 2.0]))
    assert not is_constant(np.array([2.0, 2.1]))


def test_the_error_of_an_accuracy_is_binomial() -> None:
    labels, predictions = np.array([1.0] * 100), np.array([1.0] * 80 + [0.0] * 20)
    assert estimate_standard_error("accuracy", labels, predictions, 0) == pytest.approx(0.04)
    assert bootstrap_standard_error("accuracy", labels, predictions, 0) == pytest.approx(
        0.04, rel=0.15
    )


@pytest.mark.parametrize("name", METRICS)
def test_errors_follow_the_seed(name: str) -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(2, size=150).astype(float)
    predictions = np.where(draw.random(150) < 0.8, labels, 1 - labels)
    first = estimate_standard_error(name, labels, predictions, 0)
    assert first == estimate_standard_error(name, labels, predictions, 0)
    assert first is not None
    assert 0 < first < 0.2
    assert estimate_standard_error(name, labels[:1], predictions[:1], 0) is None


def test_the_error_of_a_correlation_is_near_its_theory() -> None:
    """For normal data the error of Pearson's r is about (1 - r^2) / sqrt(n)."""
    draw = np.random.default_rng(2)
    a = draw.normal(size=400)
    b = a + draw.normal(size=400)
    expected = (1 - pearson(a, b) ** 2) / math.sqrt(400)
    assert estimate_standard_error("pearson", a, b, 0) == pytest.approx(expected, rel=0.2)
