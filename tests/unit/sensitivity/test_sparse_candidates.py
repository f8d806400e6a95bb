"""Sparse candidates: the error of the pruned and rounded weight, which every metric scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cptq.sensitivity import METRICS
from cptq.sensitivity.rounding import compute_rounding_error
from cptq.types import Candidate, LayerSpec
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded
from tests.unit.sensitivity.conftest import Score

LABELS = ("w4g16-2:4", "w4g16-s50", "w3g16-asym-2:4", "w2g16-s75", "w8c-asym-s37")


def kept(rows: list[list[float]], candidate: Candidate) -> list[list[bool]]:
    """Which weights stay, one by one; of equal ones the earlier stay in 2:4 and go elsewhere."""
    out, inputs = len(rows), len(rows[0])
    if candidate.pattern == "2:4":
        stay = [[False] * inputs for _ in rows]
        for k, row in enumerate(rows):
            for start in range(0, inputs, 4):
                block = range(start, min(start + 4, inputs))
                for i in sorted(block, key=lambda i: (-abs(row[i]), i))[:2]:
                    stay[k][i] = True
        return stay
    places = [(k, i) for k in range(out) for i in range(inputs)]
    order = sorted(places, key=lambda p: (abs(rows[p[0]][p[1]]), p))
    gone = set(order[: int(candidate.sparsity * out * inputs + 1e-9)])
    return [[(k, i) not in gone for i in range(inputs)] for k in range(out)]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("shape", [(5, 8), (3, 16), (7, 13), (9, 31), (1, 2)])
def test_the_error_is_that_of_the_pruned_weight_rounded(label: str, shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    W[0, :2] = 0.25  # a tie
    spec = LayerSpec(name="x", block=0, role="x", kind="linear", shape=shape, dtype="F32")
    candidate = Candidate.parse(label)
    mask = torch.tensor(kept(W.tolist(), candidate))
    Q = W - compute_rounding_error(W, spec, candidate)
    assert bool((Q[~mask] == 0).all())
    dense = replace(candidate, sparsity=0.0, pattern="none")
    pruned = W * mask
    torch.testing.assert_close(Q, pruned - compute_rounding_error(pruned, spec, dense))


def test_every_metric_scores_them_and_worse_than_their_dense_width(
    tiny_model: TinyModel, score: Score
) -> None:
    model = loaded(tiny_model("llama"))
    labels = ("w4g16", "w4g16-s50", "w4g16-2:4", "w4g16-s75", "w2g16")
    dense, *sparse, _ = candidates = [Candidate.parse(label) for label in labels]
    tables = score(model, tuple(METRICS), candidates, rows=20)
    for name, table in tables.items():
        for row in table.scores.values():
            assert all(row[candidate] > row[dense] for candidate in sparse), name
            assert row[sparse[2]] > row[sparse[0]], name
