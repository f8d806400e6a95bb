"""Any compressor, with scales (and scales times zero points) that float16 holds exactly.

llama.cpp stores one float16 scale per block. A checkpoint in float32 or bfloat16 has scales in its
own type, and those must be exact in float16 too, or an export would change weights.

    float32: fitted as float16 and widened, which is exact (11 of 24 bits of the fraction).
    bfloat16: 8 bits of the fraction always fit; below 2^-17 the exponent does not, above 65280
        neither. A scale outside is pulled to the bound and the codes of its group are rounded anew,
        which moves a weight by at most 2^-18 (groups of weights that small hardly exist).

An asymmetric grid has its scales rounded while they are fitted (`numerics.half_offset`), in any
type, so that llama.cpp's minimum, scale times zero point, is exact as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cptq.compression.problem import Compressor, Problem, Solution
from cptq.numerics.grid import code_range

#: the smallest and largest bfloat16 all of whose neighbours inside are float16 as well
LEAST, MOST = 2.0**-17, 65280.0


def in_half(method: Compressor) -> Compressor:
    """The compressor, its scales in the problem's type and exact in float16."""

    def compress(problem: Problem) -> Solution:
        kept = problem.scale_dtype is torch.bfloat16
        if kept and problem.symmetric:
            return _bounded(method(problem), problem.bits)
        dtype = torch.bfloat16 if kept else torch.float16
        solution = method(replace(problem, scale_dtype=dtype, half_offset=not problem.symmetric))
        return replace(solution, scale_OG=solution.scale_OG.to(problem.scale_dtype))

    return compress


def _bounded(solution: Solution, bits: int) -> Solution:
    """Scales pulled into the bounds, the codes of those groups rounded on the new ones."""
    old_OG, codes_OI = solution.scale_OG.float(), solution.codes_OI
    new_OG = old_OG.sign() * old_OG.abs().clamp(LEAST, MOST)
    if torch.equal(old_OG, new_OG):
        return solution
    moved_OI = _rounded(codes_OI, old_OG / new_OG, bits)
    return replace(solution, codes_OI=moved_OI, scale_OG=new_OG.to(solution.scale_OG.dtype))


def _rounded(codes_OI: Tensor, ratio_OG: Tensor, bits: int) -> Tensor:
    out, groups = ratio_OG.shape
    codes_OGK = codes_OI.float().view(out, groups, -1) * ratio_OG.unsqueeze(-1)
    low, high = code_range(bits)
    return codes_OGK.round().clamp(low, high).to(torch.int8).view(codes_OI.shape)
