"""The standard error by windows against one written out, and against repeated draws."""

from __future__ import annotations

import math

import pytest
import torch

from cptq.numerics.standard_error import compute_standard_error


def by_hand(windows: list[list[float]]) -> float:
    """The ratio estimate's error, in plain sums."""
    count = sum(map(len, windows))
    mean = sum(map(sum, windows)) / count
    squares = sum((sum(w) - mean * len(w)) ** 2 for w in windows)
    return math.sqrt(squares * len(windows) / (len(windows) - 1)) / count


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2], [7, 1, 1, 4], [1] * 6])
def test_equals_the_sums_written_out(lengths: list[int]) -> None:
    draw = torch.Generator().manual_seed(len(lengths))
    windows = [torch.randn(n, generator=draw, dtype=torch.float64) for n in lengths]
    window_R = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    found = compute_standard_error(torch.cat(windows), window_R)
    assert found == pytest.approx(by_hand([w.tolist() for w in windows]))


def test_rows_of_their_own_give_the_textbook_error() -> None:
    value_R = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = compute_standard_error(value_R, torch.arange(50))
    assert found == pytest.approx(float(value_R.std()) / 50**0.5)


def test_it_is_the_spread_of_means_over_draws() -> None:
    """Rows of a window share half of their variance, so that rows alone would say 4 times less."""
    draw, windows, rows = torch.Generator().manual_seed(1), 40, 32
    window_R = torch.arange(windows).repeat_interleave(rows)
    means, errors, naive = [], [], []
    for _ in range(200):
        shared = torch.randn(windows, 1, generator=draw)
        value_R = (shared + torch.randn(windows, rows, generator=draw)).flatten()
        means.append(float(value_R.mean()))
        errors.append(compute_standard_error(value_R, window_R))
        naive.append(float(value_R.std()) / len(value_R) ** 0.5)
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)
    assert sum(naive) / len(naive) < spread / 3


def test_one_window_has_no_error() -> None:
    assert compute_standard_error(torch.ones(5), torch.zeros(5, dtype=torch.long)) == 0.0
