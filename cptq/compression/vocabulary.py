"""The matrices outside the blocks: the token embedding and the output head, mostly one matrix.

They are units of a plan like every linear, and are compressed like them, with two differences.

When: an embedding that is no head goes first, so that the blocks are calibrated on what it gives. A
head goes last, on the hidden states that the compressed blocks give it.

On what: a head is a linear, so its second moment H calibrates it. Where the same matrix is the
embedding, its rows are looked up too, and an error there costs whatever direction it has, as if the
inputs were independent and equal. Both uses together are H + l I, so a head is damped by l =
`HEAD_DAMPING` instead of 0.01. smollm2-135m-dithered, the tied matrix alone, KL at 3 / 4 / 5 / 6
bits: to nearest 0.989 / 0.217 / 0.058 / 0.010, so 0.157 / 0.042 / 0.010 / 0.003. An embedding that
is no head has no inputs: it is rounded to nearest.

Cost: of a head one factorisation of width^3 and vocabulary * width^2 multiply-adds. The matrix, in
a small model the largest there is, is converted to float32 some rows at a time, and once as a whole
where it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cptq.compression import nearest
from cptq.compression.layer import Compressor, LayerProblem, LayerSolution
from cptq.numerics.float8 import FORMATS, measure_float8_error
from cptq.types import Candidate, Unit

#: share of the mean diagonal added to a head's H
HEAD_DAMPING = 0.1
#: fewest bits of a candidate: at 2 a vocabulary is lost
LEAST_BITS = 3


def is_head(unit: Unit) -> bool:
    """Whether a unit of the vocabulary is multiplied with, and not only looked up."""
    return "head" in unit.role.split("+")


def choose_compressor(unit: Unit, method: Compressor) -> Compressor:
    """Return how a unit of the vocabulary is compressed where linears are by `method`."""
    if not is_head(unit):
        return nearest.compress

    def compress(problem: LayerProblem) -> LayerSolution:
        return method(problem.damp(HEAD_DAMPING))

    return compress


def list_candidates(W_OI: Tensor, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return what a matrix of the vocabulary may become, of what the linears may.

    The integer grids of `LEAST_BITS` and more without sparsity, 16 bits, and beside 8 bits the
    8-bit floats that hold the matrix better.
    """
    plain = [c for c in candidates if c.bits >= LEAST_BITS and not c.sparsity]
    if any(c.bits == 8 for c in plain):
        best = min(FORMATS, key=lambda name: measure_float8_error(W_OI, name))
        plain.append(Candidate(bits=8, float8=best))
    return tuple(sorted(plain))
