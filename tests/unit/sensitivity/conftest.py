"""Measuring metrics on random text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from cptq.checkpoint.model import LoadedModel
from cptq.sensitivity.measure import measure
from cptq.types import Candidate, Emit, SensitivityTable
from tests.reference.sensitivity import random_calibration

Score = Callable[..., dict[str, SensitivityTable]]


@pytest.fixture(scope="session")
def score() -> Score:
    """A function: `score(model, metrics, candidates)` -> metric -> table, on random calibration."""

    def run(
        model: LoadedModel,
        metrics: Sequence[str],
        candidates: Sequence[Candidate],
        *,
        rows: int = 12,
        seed: int = 0,
        emit: Emit = lambda event: None,
    ) -> dict[str, SensitivityTable]:
        return measure(
            model,
            random_calibration(model, rows=rows),
            metrics=metrics,
            candidates=candidates,
            seed=seed,
            emit=emit,
        )

    return run
