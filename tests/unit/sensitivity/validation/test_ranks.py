"""Rank correlations against scipy and against cases that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cptq.sensitivity.validation.ranks import (
    average_within,
    compute_kendall,
    compute_spearman,
    measure_agreement,
    resample,
)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [3, 1000])
def test_they_are_those_of_scipy_ties_included(seed: int, levels: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.integers(0, levels, 37).astype(float)
    y = x + draw.normal(0, levels / 2, 37).round()
    assert compute_spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert compute_kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_a_case_counted_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert compute_kendall(x, y) == pytest.approx((5 - 1) / 6)
    assert compute_spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_a_constant_score_ranks_nothing() -> None:
    assert compute_spearman(np.ones(5), np.arange(5.0)) == 0.0
    assert compute_kendall(np.ones(5), np.arange(5.0)) == 0.0


def test_widths_alone_make_a_pooled_correlation_and_none_within() -> None:
    """A score that knows only the number of bits: high when pooled, nothing within."""
    bits = np.repeat([2, 3, 4, 8], 6)
    truth = 4.0**-bits * np.tile(np.linspace(1, 2, 6), 4)
    found = measure_agreement(
        "bits", [f"u{k}" for k in range(24)], bits.tolist(), (4.0**-bits).tolist(), truth.tolist(),
        seconds=0.0, seed=0, resamples=50,
    )  # fmt: skip
    assert found.spearman_pooled.value > 0.9
    assert found.spearman_within.value == found.kendall_within.value == 0.0


def test_within_is_the_mean_over_strata_by_their_size() -> None:
    strata = np.array([2] * 3 + [4] * 5 + [8] * 2)
    x = np.array([1.0, 2, 3, 1, 2, 3, 4, 5, 9, 1])
    y = np.array([1.0, 2, 3, 5, 4, 3, 2, 1, 1, 9])
    assert average_within(compute_kendall, strata, x, y) == pytest.approx((3 * 1 + 5 * -1) / 8)
    assert average_within(compute_kendall, strata[8:], x[8:], y[8:]) is None


def test_a_draw_takes_a_unit_with_all_of_its_rows() -> None:
    units = ["a", "b", "a", "c", "b", "a"]
    for rows in resample(units, 40, seed=3):
        drawn = [units[row] for row in rows]
        assert drawn.count("a") % 3 == 0
        assert drawn.count("b") % 2 == 0
        assert drawn.count("a") // 3 + drawn.count("b") // 2 + drawn.count("c") == 3
    assert all(
        np.array_equal(a, b)
        for a, b in zip(resample(units, 9, 1), resample(units, 9, 1), strict=True)
    )


def test_an_interval_holds_its_value_and_narrows_with_more_pairs() -> None:
    draw = np.random.default_rng(1)

    def width(count: int) -> float:
        truth = draw.lognormal(0, 1, count)
        score = truth * draw.lognormal(0, 0.5, count)
        found = measure_agreement(
            "m", [str(k) for k in range(count)], [4] * count, score.tolist(), truth.tolist(),
            seconds=0.0, seed=0, resamples=200,
        )  # fmt: skip
        kept = found.spearman_within
        assert kept.low <= kept.value <= kept.high
        return kept.high - kept.low

    assert width(160) < width(20) / 1.5
