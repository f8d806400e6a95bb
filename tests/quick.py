"""Which of many parameters the quick tests take; the others are marked slow.

@pytest.mark.parametrize("arch", keep_quick(RECIPES, "llama", "bert"))
@pytest.mark.parametrize(("bits", "group", "masked"), cover(BITS, GROUPS, [False, True]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def keep_quick(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return all values as parameters, of which those that `quick` does not name are slow."""
    values = list(values)
    assert all(value in values for value in quick), "a quick value is none of the values"
    return [v if v in quick else _make_slow(v) for v in values]


def cover(*axes: Iterable[Any], at_once: int = 2) -> list[Any]:
    """Return the product of axes as parameters, of which the quick ones cover it.

    Whatever values some axes take, `at_once` of them, a quick row has these. With 1 every value is
    in some row; with 2 every pair of values, which is where most defects of combinations show.
    """
    rows: list[Sequence[Any]] = [list(axis) for axis in axes]
    places = list(product(*(range(len(row)) for row in rows)))
    parts = {place: set(combinations(enumerate(place), at_once)) for place in places}
    left: set[Any] = set().union(*parts.values())
    quick = set()
    while left:
        best = max(places, key=lambda place: len(parts[place] & left))
        quick.add(best)
        left -= parts[best]
    made = {place: [row[k] for row, k in zip(rows, place, strict=True)] for place in places}
    return [pytest.param(*made[p]) if p in quick else _make_slow(*made[p]) for p in places]


def _make_slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)
