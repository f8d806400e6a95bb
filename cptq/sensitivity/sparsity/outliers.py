"""OWL's outlier ratio of every block: the share of |w_ij| sqrt(H_jj) above M times their mean.

Source: OWL (Yin et al., arXiv 2310.05175, section 3.1) and its code, which joins the scores of all
linears of a block; M = 5. Departure: H is that of the dense model, where its code prunes blocks on
the way. Cost: one forward pass with second moments; the scores of one block in memory.
"""

from __future__ import annotations

import torch

from cptq.calibration.samples import sample_moments
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.numerics.inequality import count_outliers
from cptq.types import Emit, Notice

#: the paper's M
OUTLIER_TIMES = 5.0


def measure_outlier_ratios(
    model: LoadedModel, calibration: Calibration, seed: int, emit: Emit
) -> dict[int, float]:
    """Return {block: outlier ratio}; blocks without a second moment are left out, with a notice."""
    ratios: dict[int, float] = {}
    for samples in sample_moments(model, calibration, seed=seed, emit=emit):
        scores, block = [], None
        for unit in samples.units:
            for spec in unit.layers:
                sample = samples.layers.get(spec.name)
                if sample is None or sample.moment is None:
                    message = "no second moment of its inputs: left out of the outlier ratio"
                    emit(Notice(kind="skipped", subject=spec.name, message=message))
                    continue
                scale_I = sample.moment.mean_II.diagonal().clamp_min(0).sqrt()
                W_OI = get_weight(model.linear(spec.name)).float()
                scores.append((W_OI.abs() * scale_I).reshape(-1))
                block = unit.block
        if block is not None:
            joined = torch.cat(scores)
            ratios[block] = count_outliers(joined, OUTLIER_TIMES) / joined.numel()
    return ratios
