from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from cptq.evaluation import baseline
from cptq.evaluation.baseline import (
    add_flips,
    add_paired_differences,
    compute_mcnemar_p,
    compute_tango_interval,
    compute_tango_statistic,
)
from cptq.evaluation.metrics import METRICS, ROW_METRICS, bootstrap
from cptq.types import EvalResult, PairedDifference, join_results
from cptq.types.samples import build_pairs, build_ratios
from tests.reference import paired as reference


def result(metric: str, value: float, per_sample, higher: bool = True) -> EvalResult:
    return EvalResult(
        task="t",
        version=1,
        metric=metric,
        value=value,
        unit="u",
        higher_is_better=higher,
        samples=len(per_sample),
        seconds=0,
        data_fingerprint="f",
        per_sample=per_sample,
    )


def compare(mine: EvalResult, base: EvalResult, seed: int = 0) -> PairedDifference:
    (found,) = add_paired_differences(join_results([mine], [base]), seed).paired
    return found


def answers(right: list[int]) -> EvalResult:
    return result("accuracy", sum(right) / len(right), build_ratios(right))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("metric", ROW_METRICS)
def test_metrics_along_rows_are_those_of_the_libraries(metric: str, classes: int) -> None:
    if metric == "f1" and classes > 2:
        pytest.skip("F1 is of one class")
    draw = np.random.default_rng(classes)
    labels = draw.integers(classes, size=(40, 7)).astype(float)  # short: constant sides happen
    predictions = draw.integers(classes, size=(40, 7)).astype(float)
    rows = ROW_METRICS[metric](labels, predictions)
    expected = [METRICS[metric](a, b) for a, b in zip(labels, predictions, strict=True)]
    assert rows == pytest.approx(expected, abs=1e-12)


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch) -> None:
    draw = np.random.default_rng(0)
    labels, predictions = draw.normal(size=(2, 31))
    whole = bootstrap(ROW_METRICS["spearman"], labels, predictions, 50, 3)
    monkeypatch.setattr("cptq.evaluation.metrics.BATCH_ELEMENTS", 100)
    assert bootstrap(ROW_METRICS["spearman"], labels, predictions, 50, 3) == pytest.approx(whole)


@pytest.mark.parametrize("counts", [(0, 0, 44), (0, 1, 44), (3, 9, 50), (16, 5, 61), (7, 7, 14)])
def test_tangos_statistic_is_that_of_the_maximised_likelihood(counts) -> None:
    for gap in (-0.4, -0.07, 0.0, 0.03, 0.35):
        if not (sum(counts[:2]) == 0 and gap == 0):
            expected = reference.score(*counts, gap)
            assert compute_tango_statistic(*counts, gap) == pytest.approx(
                expected, rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("counts", [(0, 0, 44), (0, 1, 44), (3, 9, 50), (16, 5, 61), (0, 872, 872)])
def test_the_interval_ends_where_the_statistic_meets_the_quantile(counts) -> None:
    low, high = compute_tango_interval(*counts)
    z = norm.ppf(0.975)
    assert -1 <= low <= (counts[1] - counts[0]) / counts[2] <= high <= 1
    assert compute_tango_statistic(*counts, low) == pytest.approx(z, abs=1e-6)
    assert high == 1 or compute_tango_statistic(*counts, high) == pytest.approx(-z, abs=1e-6)
    mirrored = compute_tango_interval(counts[1], counts[0], counts[2])
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_no_answer_differs_and_still_there_is_a_width() -> None:
    z = norm.ppf(0.975)
    assert compute_tango_interval(0, 0, 100)[1] == pytest.approx(z**2 / (100 + z**2))


def test_mcnemar_is_the_exact_tail() -> None:
    for lost, gained in [(0, 0), (0, 5), (3, 11), (11, 3), (6, 6), (40, 61)]:
        assert compute_mcnemar_p(lost, gained) == pytest.approx(reference.mcnemar(lost, gained))
    assert compute_mcnemar_p(0, 6) == pytest.approx(2 / 64)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    draw = np.random.default_rng(7)
    truth, hits, trials = 0.05, 0, 400
    for _ in range(trials):
        _, lost, gained = draw.multinomial(120, [0.75, 0.10, 0.15])
        low, high = compute_tango_interval(lost, gained, 120)
        hits += low <= truth <= high
    assert 0.92 < hits / trials < 0.98


def test_answers_are_compared_by_mcnemar() -> None:
    base, mine = answers([1] * 60 + [0] * 40), answers([1] * 45 + [0] * 52 + [1] * 3)
    found = compare(mine, base)
    assert (found.lost, found.gained, found.samples) == (15, 3, 100)
    assert found.difference == pytest.approx(-0.12)
    assert found.p_value == pytest.approx(reference.mcnemar(15, 3))
    assert found.verdict == "worse"
    assert found.at_most_worse == -found.interval[0] > 0.12


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_the_paired_bootstrap_of_a_metric_is_that_of_a_loop(metric: str, monkeypatch) -> None:
    monkeypatch.setattr(baseline, "RESAMPLES", 80)
    draw = np.random.default_rng(5)
    labels = draw.integers(2, size=83).astype(float)
    sides = [np.where(draw.random(83) < share, labels, 1 - labels) for share in (0.7, 0.9)]
    rows = [result(metric, METRICS[metric](labels, x), build_pairs(labels, x)) for x in sides]
    found = compare(*rows, seed=11)

    def gap(pick) -> float:
        mine, base = (METRICS[metric](labels[pick], side[pick]) for side in sides)
        return mine - base

    values = reference.bootstrap(gap, 83, 80, 11)
    assert found.interval == pytest.approx(np.quantile(values, (0.025, 0.975)))
    side = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))
    assert found.p_value == pytest.approx(2 * (side + 1) / 81)
    assert found.verdict == "worse"


def test_perplexity_is_compared_by_windows(monkeypatch) -> None:
    monkeypatch.setattr(baseline, "RESAMPLES", 150)
    draw = np.random.default_rng(5)
    tokens = draw.integers(50, 90, size=31)
    base = draw.normal(3, 0.4, size=31) * tokens
    mine = base + draw.normal(0.1, 0.02, size=31) * tokens
    rows = [
        result(
            "perplexity", math.exp(x.sum() / tokens.sum()), build_ratios(x, tokens, "exp"), False
        )
        for x in (mine, base)
    ]
    found = compare(*rows)

    def gap(pick) -> float:
        total = sum(tokens[i] for i in pick)
        return math.exp(sum(mine[i] for i in pick) / total) - math.exp(
            sum(base[i] for i in pick) / total
        )

    values = reference.bootstrap(gap, 31, 150, 0)
    assert found.interval == pytest.approx(np.quantile(values, (0.025, 0.975)), rel=1e-6)
    # pairing sees a tenth of a nat that two separate errors would drown
    assert found.verdict == "worse"
    assert found.at_most_worse == found.interval[1]


def test_equal_and_undecided() -> None:
    one = answers([1, 0, 1, 1])
    assert compare(one, one).verdict == "equal"
    other = answers([1, 1, 1, 1])
    assert compare(other, one).verdict == "undecided"
    few = result("pearson", 0.5, build_pairs([1, 2, 3], [1, 3, 2]))
    found = compare(few, few)
    assert found.verdict == "equal"
    assert "3 samples" in found.method


def test_what_cannot_be_paired_keeps_its_reason() -> None:
    one = answers([1, 0])
    for base in (
        replace(one, data_fingerprint="g"),
        replace(one, version=2),
        replace(one, per_sample=None),
        answers([1, 0, 1]),
        replace(one, value=math.nan),
    ):
        joined = join_results([one], [base])
        assert joined.rows[0].mismatch is not None
        assert add_paired_differences(joined, 0) == joined
    alone = join_results([one])
    assert add_paired_differences(alone, 0) == alone
    unkept = replace(one, per_sample=None)
    assert add_paired_differences(join_results([unkept], [unkept]), 0).paired == ()


def test_flips_by_hand() -> None:
    ours, theirs = (result("acc", 0.5, build_ratios(hits)) for hits in ([1, 0, 1, 0], [0, 1, 1, 0]))
    acc, flips = add_flips(join_results([ours], [theirs])).results
    assert acc is ours
    assert (flips.metric, flips.value, flips.higher_is_better) == ("flips", 0.5, False)
    assert flips.stderr == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    ours, theirs = (
        result("accuracy", 0.5, build_pairs([0, 1, 2, 1], answered))
        for answered in ([0, 1, 1, 0], [0, 0, 1, 1])
    )
    assert add_flips(join_results([ours], [theirs])).results[1].value == 0.5


def test_one_answer_may_flip_too() -> None:
    flips = add_flips(join_results([answers([1])], [answers([0])])).results[1]
    assert (flips.value, flips.stderr) == (1.0, None)


def test_other_samples_have_no_flips() -> None:
    ours = result("acc", 0.5, build_ratios([1, 0]))
    for other in (replace(ours, data_fingerprint="g"), replace(ours, per_sample=None)):
        joined = join_results([ours], [other])
        assert add_flips(joined) == joined
