"""Knees of curves whose bend is known."""

from __future__ import annotations

import pytest

from cptq.numerics.knee import find_knee


@pytest.mark.parametrize("power", [2, 3, 4, 7])
def test_the_knee_of_a_power_is_where_its_slope_is_that_of_the_chord(power: int) -> None:
    places = [i / 1000 for i in range(1001)]
    at = find_knee(places, [p**power for p in places])
    assert at is not None
    assert places[at] == pytest.approx(power ** (-1 / (power - 1)), abs=1e-3)


def test_scale_and_shift_change_nothing() -> None:
    places, values = [0.0, 0.1, 0.3, 0.5, 0.9], [0.0, 0.01, 0.05, 0.4, 9.0]
    at = find_knee(places, values)
    assert at == 3
    assert find_knee([7 * p - 2 for p in places], [100 * v + 5 for v in values]) == at


def test_the_corner_of_two_lines_is_the_knee() -> None:
    assert find_knee([0, 1, 2, 3, 4], [0, 0.1, 0.2, 5, 10]) == 2


@pytest.mark.parametrize(
    "values",
    [[0, 1, 2, 3], [0, 5, 6, 6.5], [1, 1, 1, 1], [3, 2, 1, 0]],
    ids=["straight", "concave", "constant", "falling"],
)
def test_a_curve_that_does_not_bend_has_none(values: list[float]) -> None:
    assert find_knee([0, 1, 2, 3], values) is None


@pytest.mark.parametrize(
    ("places", "values"), [([0.0], [0.0]), ([0.0, 0.0], [0.0, 1.0]), ([0.0, 1.0], [0.0])]
)
def test_what_is_no_curve_is_refused(places: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match="curve"):
        find_knee(places, values)
