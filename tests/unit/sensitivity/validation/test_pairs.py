"""Pairs cover what they promise to cover."""

from __future__ import annotations

from collections import Counter

import pytest

from cptq.sensitivity.validation.pairs import (
    choose_pairs,
    classify_depth,
    interleave_units,
    rank_depths,
)
from cptq.types import Candidate
from tests.unit.report import synthetic

CANDIDATES = synthetic.CANDIDATES  # 2, 3, 4, 5, 6, 8 bits and dense
UNITS = synthetic.make_units(30)


def test_the_ends_are_three_tenths_of_the_blocks() -> None:
    assert Counter(classify_depth(b, 30) for b in range(30)) == {
        "first": 9,
        "middle": 12,
        "last": 9,
    }
    assert [classify_depth(b, 5) for b in range(5)] == ["first", "first", "middle", "last", "last"]
    assert classify_depth(None, 5) == "outside"
    assert classify_depth(0, 1) == "first"


def test_every_width_gets_as_many_pairs_of_different_units_in_every_cell() -> None:
    pairs = choose_pairs(UNITS, 30, CANDIDATES, 96, seed=0)
    assert len(pairs) == len(set(pairs)) == 96
    assert Counter(c.bits for _, c in pairs) == dict.fromkeys([2, 3, 4, 5, 6, 8], 16)
    for candidate in CANDIDATES[:-1]:
        mine = [unit for unit, c in pairs if c == candidate]
        assert len({unit.name for unit in mine}) == 16
        cells = Counter((classify_depth(unit.block, 30), unit.role) for unit in mine)
        assert len(cells) == 12
        assert max(cells.values()) <= 2


def test_units_repeat_only_when_all_have_been_used() -> None:
    pairs = choose_pairs(UNITS, 30, CANDIDATES, 120, seed=5)
    assert len({unit.name for unit, _ in pairs}) == len(UNITS) == 120


def test_more_than_there_is_gives_all_there_is() -> None:
    few = UNITS[:4]
    pairs = choose_pairs(few, 30, CANDIDATES, 10_000, seed=0)
    assert len(pairs) == len(set(pairs)) == 4 * 6


def test_the_seed_decides() -> None:
    assert choose_pairs(UNITS, 30, CANDIDATES, 24, 1) == choose_pairs(UNITS, 30, CANDIDATES, 24, 1)
    assert interleave_units(UNITS, 30, 1) != interleave_units(UNITS, 30, 2)
    assert sorted(u.name for u in interleave_units(UNITS, 30, 1)) == sorted(u.name for u in UNITS)


def test_depth_factors_are_relative_to_role_and_width() -> None:
    two, four = Candidate(bits=2), Candidate(bits=4)
    rows = [
        ("first", "down", two, 8.0), ("middle", "down", two, 2.0),
        ("first", "qkv", four, 0.04), ("middle", "qkv", four, 0.01),
        ("last", "o", two, 5.0),  # nothing of its role and width elsewhere: says nothing
        ("middle", "down", two, 0.0),  # no logarithm
    ]  # fmt: skip
    assert rank_depths(rows) == pytest.approx({"first": 2.0, "middle": 0.5})
