from __future__ import annotations

import random

import numpy as np
import pytest

from cptq.data import overlap as module
from cptq.data.overlap import (
    WINDOW,
    WORDS,
    build_sketch,
    decode_sketch,
    encode_sketch,
    hash_row,
    measure_overlap,
    winnow,
)
from cptq.errors import DataError


def words(count: int, seed: int) -> str:
    """Words that no other seed has."""
    draw = random.Random(seed)
    return " ".join(f"w{seed}x{draw.randrange(10**6)}" for _ in range(count))


def naive_winnowing(hashes: list[int]) -> set[int]:
    if len(hashes) <= WINDOW:
        return {min(hashes)} if hashes else set()
    return {min(hashes[i : i + WINDOW]) for i in range(len(hashes) - WINDOW + 1)}


def test_equal_runs_have_equal_hashes_and_others_do_not() -> None:
    text = words(60, 1)
    whole = hash_row(text)
    assert len(whole) == 60 - WORDS + 1
    assert len(set(whole.tolist())) == len(whole)
    later = hash_row(words(7, 2) + " " + text)
    assert later[7:].tolist() == whole.tolist()
    assert not set(later[:7].tolist()) & set(whole.tolist())


def test_spacing_case_signs_and_accents_change_nothing() -> None:
    plain = "the cafe at the corner is open on every day of the week but one"
    fancy = "The  café, at the\n\ncorner -- is open on ÉVERY day; of the week (but one)!"
    assert hash_row(plain).tolist() == hash_row(fancy).tolist()


def test_order_matters_and_short_rows_count_whole() -> None:
    assert hash_row("one two three four") != hash_row("two one three four")
    assert len(hash_row("one two three four")) == 1
    assert len(hash_row("one two three")) == 0


def test_winnowing_is_the_definition() -> None:
    for count in (0, 1, WINDOW, WINDOW + 1, 500):
        hashes = np.random.default_rng(count).integers(2**63, size=count).astype(np.uint64)
        assert set(winnow(hashes).tolist()) == naive_winnowing(hashes.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_a_passage_of_44_words_is_always_seen(seed: int) -> None:
    passage = words(WORDS + WINDOW - 1, 1000 + seed)
    known = build_sketch([words(300, 1) + " " + passage + " " + words(200, 2)])
    found = measure_overlap(known, [words(90, 3) + " " + passage + " " + words(150 + seed, 4)])
    assert found.found >= 1


def test_the_share_follows_how_much_is_shared() -> None:
    rows = [words(300, seed) for seed in range(40)]
    known = build_sketch(rows)
    assert measure_overlap(known, rows).share == 1
    assert measure_overlap(known, [words(300, seed) for seed in range(100, 140)]).found == 0
    half = measure_overlap(known, rows[:20] + [words(300, seed) for seed in range(100, 300)])
    assert half.share == pytest.approx(0.5, abs=0.02)
    # one window of forty, in a text ten times as long
    one = measure_overlap(known, [words(300, seed) for seed in range(100, 500)] + rows[7:8])
    assert one.leaks
    assert one.share == pytest.approx(1 / 40, abs=0.01)
    # all that is evaluated comes from a large calibration text
    assert measure_overlap(build_sketch(rows), rows[3:4]).share == 1


def test_the_sketch_has_a_size_and_says_when_it_is_damaged() -> None:
    hashes = build_sketch([words(20_000, 1)])
    assert len(hashes) == pytest.approx(2 * 20_000 / (WINDOW + 1), rel=0.1)
    assert decode_sketch(encode_sketch(hashes)).tolist() == hashes.tolist()
    assert len(encode_sketch(hashes)) < 15_000
    for damaged in ("no base64!", "AAAA"):
        with pytest.raises(DataError, match="fingerprints"):
            decode_sketch(damaged)


def test_a_large_sketch_is_cut_and_still_tells_the_share(monkeypatch) -> None:
    rows = [words(400, seed) for seed in range(30)]
    monkeypatch.setattr(module, "MOST", 200)
    known = build_sketch(rows)
    assert len(known) == 200
    assert measure_overlap(known, rows[:15]).found == pytest.approx(100, abs=25)


def test_nothing_to_compare_is_no_overlap() -> None:
    assert measure_overlap(build_sketch([]), ["a few words that are here"]).share == 0
    assert measure_overlap(build_sketch([words(40, 1)]), []).share == 0
