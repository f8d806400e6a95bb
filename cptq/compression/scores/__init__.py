"""Which weights a sparse candidate keeps: scores of weights, one file each, of which the smallest
go by the candidate's pattern (`numerics.masks`).

Every score is called with the same values, the weight that is to be stored and the second moment of
its inputs, and each uses what it needs. `sparsegpt` chooses again inside the column sweep, where
weights have moved; its score on the weights as they were fits the grids, and chooses where no sweep
runs (`compression.nearest`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cptq.numerics.masks import build_magnitude_mask, build_n_of_m_mask, build_row_mask
from cptq.registry import Registry
from cptq.types import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A way to score weights; the largest magnitudes stay.

    Attributes:
        compute: (W_OI, H_II or None, seed) -> score_OI. Without H all inputs count alike.
        by_row: a share is dropped of every output alike, rather than of the whole matrix.
        in_sweep: the mask is chosen anew inside the column sweep.
    """

    compute: Callable[[Tensor, Tensor | None, int], Tensor]
    by_row: bool = False
    in_sweep: bool = False


#: --sparsity-score
SCORES: Registry[Score] = Registry(
    "sparsity score",
    {
        "wanda": "cptq.compression.scores.wanda:SCORE",
        "sparsegpt": "cptq.compression.scores.sparsegpt:SCORE",
        "magnitude": "cptq.compression.scores.magnitude:SCORE",
        "random": "cptq.compression.scores.random:SCORE",
    },
)
DEFAULT_SCORE = "wanda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How masks are chosen: by a name of `SCORES`, and the seed of those that draw lots."""

    score: str = DEFAULT_SCORE
    seed: int = 0


USUAL_MASKING = Masking()


def choose_mask(
    score: Score, W_OI: Tensor, H_II: Tensor | None, candidate: Candidate, seed: int
) -> Tensor | None:
    """Return which weights a candidate keeps, bool (out, in); None for one without sparsity."""
    if not candidate.sparsity:
        return None
    score_OI = score.compute(W_OI, H_II, seed)
    if candidate.kept_of is not None:
        return build_n_of_m_mask(score_OI, *candidate.kept_of)
    choose = build_row_mask if score.by_row else build_magnitude_mask
    return choose(score_OI, candidate.sparsity)
