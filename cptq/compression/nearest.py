"""`nearest`: round to nearest on MSE-clipped symmetric scales. Uses no activations.

The baseline that every table has (RTN). See `numerics.grid` for the equation and its source.
"""

from __future__ import annotations

from cptq.compression.problem import Problem, Solution
from cptq.numerics.grid import quantize_nearest


def compress(problem: Problem) -> Solution:
    """Round each weight to the nearest point of its group's grid."""
    codes_OI, scale_OG = quantize_nearest(
        problem.W_OI, problem.bits, problem.group, scale_dtype=problem.scale_dtype
    )
    return Solution(codes_OI=codes_OI, scale_OG=scale_OG)
