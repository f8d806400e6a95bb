"""The first trial whose difference is plain decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cptq.pipeline.plan_check import list_trial_texts
from cptq.pipeline.uniform_check import Trial, keep_better_plan
from cptq.types import Budget, Candidate, Plan
from tests.conftest import Heard

ROWS = 8


def plan(bits: int, allocator: str) -> Plan:
    return Plan(
        model_fingerprint="",
        budget=Budget(limit_bytes=0, asked="by hand"),
        allocator=allocator,
        metric=None,
        table_digest=None,
        choices={"unit": Candidate(bits=bits, group_size=16)},
        predicted_bytes=0,
        predicted_loss=None,
    )


OWN, OTHER = plan(3, "knapsack"), plan(4, "even")


@dataclass
class Judge:
    """What the divergences are measured by."""

    unit: str = "nats"
    tokens: int = 64
    window_R: Tensor = field(default_factory=lambda: torch.arange(ROWS))

    def describe_difference(self, gap_R: Tensor) -> str:
        return f"difference {float(gap_R.mean()):+.3g}"


def decide(found: Sequence[tuple[float, float]], heard: Heard) -> tuple[str, list[str]]:
    """Return whose plan is kept, and the trials that ran; `found`: of plan and baseline in each."""
    ran: list[str] = []
    noise_R = torch.linspace(0.9, 1.1, ROWS, dtype=torch.float64)

    def make(tokens: int, pair: tuple[float, float]) -> Trial:
        def measure(plans: Sequence[Plan]) -> list[Tensor]:
            assert [tried.allocator for tried in plans] == ["knapsack", "even"]
            ran.append(str(tokens))
            return [mean * noise_R for mean in pair]

        return Trial(tokens=tokens, measure=measure)

    trials = [make(tokens, pair) for tokens, pair in enumerate(found)]
    better = keep_better_plan(OWN, OTHER, trials, cast(Any, Judge()), heard)
    assert better.notes[-1] == heard.notices[-1]
    assert f"calibrated on {ran[-1]})" in better.notes[-1]
    return better.allocator, ran


@pytest.mark.parametrize(
    ("found", "kept", "ran"),
    [
        ([(1.0, 2.0), (9.0, 1.0), (9.0, 1.0)], "knapsack", 1),
        ([(2.0, 1.0), (1.0, 2.0)], "even", 1),
        ([(1.0, 1.02), (2.0, 1.0), (1.0, 2.0)], "even", 2),  # within SHARE
        ([(1.0, 1.01), (1.01, 1.0)], "even", 2),
        ([(1.0, 1.01), (1.0, 1.0)], "knapsack", 2),  # kept where both are equal
    ],
)
def test_the_first_plain_trial_decides(
    found: list[tuple[float, float]], kept: str, ran: int, heard: Heard
) -> None:
    assert decide(found, heard) == (kept, [str(i) for i in range(ran)])


@pytest.mark.parametrize(
    ("batches", "rows", "tokens"),
    [(8, 8, [2048, 8192]), (3, 64, [2048, 8192]), (3, 8, [2048, 8192]), (1, 3, [1536])],
)
def test_trials_begin_with_part_of_a_batch(batches: int, rows: int, tokens: list[int]) -> None:
    ids = torch.arange(batches * rows * 512).view(batches, rows, 512)
    text = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    inputs = SimpleNamespace(calibration=SimpleNamespace(batches=text))
    found = list_trial_texts(cast(Any, inputs))
    assert list(found) == tokens
    for count, parts in found.items():
        read = torch.cat([part["input_ids"].flatten() for part in parts])
        assert read.tolist() == list(range(count))
