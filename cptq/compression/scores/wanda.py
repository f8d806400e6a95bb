"""`wanda`: |w_ij| |x_j|, with |x_j|^2 = n H_jj the energy of input j on the calibration text.

Source: Wanda (Sun et al., arXiv 2306.11695, equation 1); its code keeps the mean of x_j^2, as here.

Departures: the paper compares the weights of one output and leaves the others as they are; here a
share is dropped of the whole matrix, and what stays makes up for what goes (`compression.gptq`,
unless the compressor is `nearest`).

Cost: one product per weight. Limits: inputs count as independent.
"""

from __future__ import annotations

from torch import Tensor

from cptq.compression.scores import Score


def compute(W_OI: Tensor, H_II: Tensor | None, _seed: int) -> Tensor:
    """Return w_ij sqrt(H_jj)."""
    return W_OI if H_II is None else W_OI * H_II.diagonal().clamp_min(0).sqrt()


SCORE = Score(compute=compute)
