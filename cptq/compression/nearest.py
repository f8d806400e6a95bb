"""`nearest`: round to nearest on MSE-clipped scales. Uses no activations.

The baseline that every table has (RTN). See `numerics.grid` and `numerics.asymmetric` for the
equations and their source.
"""

from __future__ import annotations

from cptq.compression.problem import Problem, Solution
from cptq.numerics.asymmetric import quantize_asymmetric
from cptq.numerics.grid import quantize_nearest


def compress(problem: Problem) -> Solution:
    """Round each weight to the nearest point of its group's grid."""
    W_OI = problem.W_OI if problem.mask_OI is None else problem.W_OI * problem.mask_OI
    bits, group, dtype = problem.bits, problem.group, problem.scale_dtype
    if problem.symmetric:
        codes_OI, scale_OG = quantize_nearest(W_OI, bits, group, scale_dtype=dtype)
        return Solution(codes_OI=codes_OI, scale_OG=scale_OG)
    codes_OI, scale_OG, zero_OG = quantize_asymmetric(
        W_OI, bits, group, scale_dtype=dtype, half_offset=problem.half_offset
    )
    return Solution(codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG)
