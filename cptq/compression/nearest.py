"""`nearest`: round to nearest on MSE-clipped scales. Uses no activations.

The baseline that every table has (RTN). See `numerics.grid` for the equations and their source.
"""

from __future__ import annotations

import torch

from cptq.compression.layer import LayerProblem, LayerSolution, choose_dtype
from cptq.numerics.float8 import round_to_float8
from cptq.numerics.grid import quantize_nearest

#: weights that are rounded at once
CHUNK = 1 << 22


def compress(problem: LayerProblem) -> LayerSolution:
    """Round each weight to the nearest point of its group's grid."""
    size = max(1, CHUNK // problem.W_OI.shape[1])
    parts = [_round(part) for part in problem.split_rows(size, choose_dtype(problem.W_OI))]
    zeros = [part.zero_OG for part in parts if part.zero_OG is not None]
    return LayerSolution(
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scale_OG=torch.cat([part.scale_OG for part in parts]),
        zero_OG=torch.cat(zeros) if zeros else None,
    )


def _round(problem: LayerProblem) -> LayerSolution:
    W_OI = problem.W_OI
    if problem.float8:
        codes_OI = round_to_float8(W_OI, problem.float8)
        return LayerSolution(codes_OI=codes_OI, scale_OG=W_OI.new_ones(len(codes_OI), 1))
    if problem.mask_OI is not None:
        W_OI = W_OI * problem.mask_OI
    codes_OI, scale_OG, zero_OG = quantize_nearest(
        W_OI,
        problem.bits,
        problem.group,
        symmetric=problem.symmetric,
        scale_dtype=problem.scale_dtype,
        float16_offset=problem.float16_offset,
        levels=problem.levels,
    )
    return LayerSolution(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG)
