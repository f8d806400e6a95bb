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
from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A way to score weights; the largest magnitudes stay.

    Attributes:
        compute: (W_OI, H_II or None, seed) -> score_OI. Without H all inputs count alike.
        in_sweep: the mask is chosen anew inside the column sweep.
    """

    compute: Callable[[Tensor, Tensor | None, int], Tensor]
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
