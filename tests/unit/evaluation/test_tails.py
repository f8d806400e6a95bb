from __future__ import annotations

import numpy as np
import pytest

from cptq.evaluation.tails import quantile
from tests.reference.tails import bootstrap_quantile_error, naive_quantile


def drawn(windows: int, tokens: int, spread: float, seed: int) -> np.ndarray:
    """Heavy tails, as KL has, each window with a level of its own."""
    generator = np.random.default_rng(seed)
    level_N = np.exp(spread * generator.normal(size=(windows, 1)))
    return level_N * generator.exponential(size=(windows, tokens)) ** 2


@pytest.mark.parametrize(("level", "spread"), [(0.5, 0.7), (0.9, 0.0), (0.9, 0.7)])
def test_the_error_is_that_of_the_bootstrap_over_windows(level: float, spread: float) -> None:
    values_NT = drawn(61, 37, spread, 1)
    found = quantile(values_NT, level)
    assert found.value == pytest.approx(naive_quantile(values_NT.ravel().tolist(), level))
    slow = bootstrap_quantile_error(values_NT.tolist(), level, 300, 0)
    assert found.stderr == pytest.approx(slow, rel=0.25)


@pytest.mark.parametrize(("windows", "level"), [(80, 0.99), (200, 0.999)])
def test_the_error_is_the_spread_over_texts(windows: int, level: float) -> None:
    """Not of resamples: of new texts, windows and all."""
    estimates = [quantile(drawn(windows, 50, 0.5, seed), level) for seed in range(300)]
    truth = np.std([found.value for found in estimates])
    assert np.mean([found.stderr for found in estimates]) == pytest.approx(truth, rel=0.2)


def test_windows_that_are_alike_count_once() -> None:
    """The same tokens in ten copies within each window tell no more."""
    once = drawn(61, 37, 0.5, 3)
    assert quantile(np.repeat(once, 10, 1), 0.9).stderr == pytest.approx(
        quantile(once, 0.9).stderr, rel=0.05
    )


def test_too_few_windows_have_no_error() -> None:
    assert quantile(drawn(1, 50, 0.0, 0), 0.9).stderr is None
    assert quantile(drawn(3, 50, 0.0, 0), 0.999).stderr is None
    nothing = quantile(np.zeros((4, 7)), 0.99)
    assert (nothing.value, nothing.stderr) == (0.0, 0.0)
