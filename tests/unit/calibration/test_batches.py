"""Cutting batches into rows and putting rows together again."""

from __future__ import annotations

import pytest
import torch

from cptq.calibration import batches
from cptq.calibration.batches import (
    choose_held_out_tokens,
    count_tokens,
    select_gradient_rows,
    split_batches,
    split_held_out,
    stack_rows,
)


def batch(lengths: list[int], start: int = 1) -> dict[str, torch.Tensor]:
    width = max(lengths) + 2
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), None
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(start + 100 * row, start + 100 * row + length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def test_nothing_is_lost_by_cutting_and_stacking() -> None:
    whole = [batch([5, 3, 9]), batch([1, 7], start=500)]
    rows = split_batches(whole, tokens=1)
    assert [b["input_ids"].shape for b in rows] == [(1, 5), (1, 3), (1, 9), (1, 1), (1, 7)]
    again = stack_rows(rows, tokens=20)
    assert texts(again) == texts(whole) == texts(rows)
    assert all(b["input_ids"].numel() <= 20 for b in again)
    assert len(again) < len(rows)


def test_language_models_hold_out_whole_windows_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ENOUGH_TOKENS", 100)
    rows = [batch([40]) | {} for _ in range(16)]
    for index, row in enumerate(rows):
        row["input_ids"] += 1000 * index
    split = split_held_out(rows, "causal-lm", 100)
    assert not split.overlap
    assert [row[0] // 1000 for row in texts(split.held_out)] == [14, 15]
    assert count_tokens(split.held_out) == 80
    assert len(texts(split.fit)) == 14
    short = split_held_out(rows, "causal-lm", 32)  # less than a window: its beginning
    assert [len(row) for row in texts(short.held_out)] == [32]


def test_sentences_stay_whole_and_few_tokens_are_shared() -> None:
    split = split_held_out([batch([5, 3, 9, 4])], "classifier", 32)
    assert split.overlap
    assert [len(row) for row in texts(split.fit)] == [5, 3, 9, 4]
    assert [len(row) for row in texts(split.held_out)] == [9, 4]


def test_a_single_row_serves_both() -> None:
    split = split_held_out([batch([6])], "causal-lm", 32)
    assert split.overlap
    assert count_tokens(split.fit) == 6
    assert count_tokens(split.held_out) == 6


def test_small_models_can_afford_more_tokens() -> None:
    assert choose_held_out_tokens(134_515_008, on_cpu=True) == 520
    assert choose_held_out_tokens(7_000_000_000, on_cpu=True) == 512
    assert choose_held_out_tokens(7_000_000_000, on_cpu=False) == 2048
    assert choose_held_out_tokens(260_032, on_cpu=True) == 2048


def test_gradients_are_taken_on_the_beginnings_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "GRADIENT_WINDOW", 8)
    rows = [batch([20, 20]), batch([20, 20], start=500)]
    chosen = select_gradient_rows(rows, "causal-lm", 24)
    assert [text[0] for text in texts(chosen)] == [1, 101, 500]
    assert {len(text) for text in texts(chosen)} == {8}
    assert len(texts(select_gradient_rows(rows, "causal-lm", 1))) == 1  # one at least


def test_sentences_stay_whole_for_gradients() -> None:
    rows = [batch([20, 5, 9, 3])]
    assert [len(text) for text in texts(select_gradient_rows(rows, "classifier", 34))] == [20, 5, 9]
