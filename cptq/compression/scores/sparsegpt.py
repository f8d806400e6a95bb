"""`sparsegpt`: w_ij^2 [U_jj]^-2, what dropping a weight costs once later inputs make up for it.

    H^-1 = U^T U,      s_ij = |w_ij| / U_jj

Source: SparseGPT (Frantar & Alistarh, arXiv 2301.00774, section 3.2) and its code: the mask is
chosen inside the column sweep, of a share for 128 inputs at a time over all outputs, of N:M for
every M inputs, from the weights as they are by then (`numerics.sweep_mask`), jointly with rounding.

Departures:
- a share is exact: every 128 inputs drop what brings the count so far to the share of it, rounded
  down; the code takes a threshold of each, ties included;
- for N:M inputs are visited by falling H_jj, in whole runs of M: on a matrix of 96 x 256 with
  decaying spectrum, 4 bits and 2:4, that loses 0.0197 of the output, and 0.0208 as they come (4:8:
  0.0147, 0.0153). For a share they are visited as they come, like in its code: sorted, each 128
  would drop as much as the others although they matter less (50%: 0.0168 sorted, 0.0100 as they
  come, 0.0101 by Wanda's mask);
- scales are fitted beforehand to what this score keeps of the weights as they were, and again
  afterwards to what was kept (`numerics.refit`); its code fits them to the dense weight;
- inputs that are zero in every calibration token go first and are rounded if they stay; its code
  drops them all, beyond the share.

Cost: with the sweep nothing but the selection. The function below, which has a factorisation of its
own, fits grids and serves compressors without a sweep.
"""

from __future__ import annotations

from torch import Tensor

from cptq.compression.scores import Score
from cptq.numerics.hessian import factor_damped_inverse, find_dead_inputs

#: share of the mean diagonal added to H, as in SparseGPT's code
DAMPING = 0.01


def compute(W_OI: Tensor, H_II: Tensor | None, _seed: int) -> Tensor:
    """Return w_ij / U_jj with inputs as they come; w_ij where H cannot be factored."""
    if H_II is None or bool(find_dead_inputs(H_II).all()):
        return W_OI
    U_II, _ = factor_damped_inverse(H_II, DAMPING)
    if U_II is None:
        return W_OI
    cost_I = U_II.diagonal().reciprocal()
    return W_OI * cost_I.masked_fill(find_dead_inputs(H_II), 0.0)


SCORE = Score(compute=compute, in_sweep=True)
