"""Results joined with a baseline's: what belongs together, and what cannot be paired."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cptq.types import EvalResult, join_results
from cptq.types.samples import build_pairs, build_ratios

ONE = EvalResult(
    task="t",
    version=1,
    metric="m",
    value=1.0,
    unit="u",
    higher_is_better=True,
    samples=2,
    seconds=1.0,
    data_fingerprint="f",
    per_sample=build_ratios([1, 1]),
)


@pytest.mark.parametrize(
    ("own", "base", "higher", "verdict"),
    [
        (2.0, 1.0, False, "worse"),
        (1.0, 2.0, False, "better"),
        (2.0, 1.0, True, "better"),
        (1.0, 2.0, True, "worse"),
        (1.0, 1.0, True, "same"),
        (math.nan, 1.0, True, ""),
    ],
)
def test_the_verdict_knows_the_direction(
    own: float, base: float, higher: bool, verdict: str
) -> None:
    both = [replace(ONE, value=value, higher_is_better=higher) for value in (own, base)]
    (row,) = join_results(both[:1], both[1:]).rows
    assert row.verdict == verdict


def test_only_the_same_number_is_compared() -> None:
    own = [replace(ONE, metric="a"), replace(ONE, metric="b", version=2)]
    base = [replace(ONE, value=3.0, metric="b"), replace(ONE, value=4.0, metric="a")]
    joined = join_results(own, base)
    assert [row.difference for row in joined.rows] == [-3.0, None]
    assert joined.rows[1].verdict == ""
    assert joined.results == tuple(own)
    assert joined.baseline == tuple(base)


def test_results_without_a_baseline_are_rows_too() -> None:
    (row,) = join_results([ONE]).rows
    assert (row.result, row.baseline, row.difference, row.mismatch) == (ONE, None, None, None)
    assert not row.same_samples
    assert join_results([ONE], [replace(ONE, metric="n")]).rows == (row,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_fingerprint": "g"}, "samples are not the same"),
        ({"data_fingerprint": None}, "samples are not the same"),
        ({"per_sample": None}, "no values of single samples"),
        ({"per_sample": build_ratios([1, 0, 1])}, "2 and 3 samples"),
        ({"per_sample": build_pairs([1, 1], [0, 1])}, "2 and 2 samples"),
    ],
)
def test_other_samples_are_a_mismatch(change, named: str) -> None:
    (row,) = join_results([ONE], [replace(ONE, **change)]).rows
    assert not row.same_samples
    assert row.difference == 0.0
    assert named in str(row.mismatch)


def test_the_same_samples_may_still_not_be_paired() -> None:
    alone = replace(ONE, per_sample=build_ratios([1]))
    for own, base in ((ONE, replace(ONE, value=math.nan)), (alone, alone)):
        (row,) = join_results([own], [base]).rows
        assert row.same_samples
        assert row.mismatch is not None
    (row,) = join_results([replace(ONE, version=2)], [ONE]).rows
    assert (row.baseline, row.same_samples) == (None, False)
    assert "versions 2 and 1" in str(row.mismatch)
    # a number that keeps no samples, such as a file's bytes, is never expected to be paired
    (row,) = join_results([replace(ONE, per_sample=None)], [ONE]).rows
    assert row.mismatch is None
