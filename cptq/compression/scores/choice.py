"""The mask of a sparse candidate, by a score that is known before the sweep."""

from __future__ import annotations

from torch import Tensor

from cptq.compression.scores import Score
from cptq.numerics.masks import build_magnitude_mask, build_n_of_m_mask
from cptq.types import Candidate


def choose_mask(
    score: Score, W_OI: Tensor, H_II: Tensor | None, candidate: Candidate, seed: int
) -> Tensor | None:
    """Return which weights a candidate keeps, bool (out, in); None for one without sparsity."""
    if not candidate.sparsity:
        return None
    score_OI = score.compute(W_OI, H_II, seed)
    if candidate.kept_of is not None:
        return build_n_of_m_mask(score_OI, *candidate.kept_of)
    return build_magnitude_mask(score_OI, candidate.sparsity)
