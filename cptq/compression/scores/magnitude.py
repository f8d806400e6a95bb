"""`magnitude`: |w|, one threshold per matrix (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from torch import Tensor

from cptq.compression.scores import Score


def compute(W_OI: Tensor, _H_II: Tensor | None, _seed: int) -> Tensor:
    """Return the weight itself."""
    return W_OI


SCORE = Score(compute=compute)
