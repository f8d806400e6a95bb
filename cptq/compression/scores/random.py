"""`random`: lots, the naive baseline that every score has to beat.

Drawn on the CPU from one seed per layer, so that a layer's mask depends neither on the device nor
on which layers were compressed before it. Cost: one number per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptq.compression.scores import Score


def compute(W_OI: Tensor, _H_II: Tensor | None, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1), of the shape of the weight."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(W_OI.shape, generator=generator).to(W_OI.device)


SCORE = Score(compute=compute)
