"""`delta-loss` (AutoRound): the gradient in the quantized model times what rounding changed.

    score = sum_ki |g_Q,ki (W_ki - Q(W)_ki)|,      g_Q = gradient of L with every unit at Q(W)

as Intel's AutoRound scores schemes for mixed precision (AutoScheme; SignRoundV2,
arXiv 2512.04746): one backward pass per bit-width, with the whole model rounded to it, gives the
gradients of all units. The absolute value is taken per weight, after the gradient has been summed
over all tokens: an upper bound of |g_Q . d|, blind to what cancels between weights.

Departures: L is KL(dense || model) instead of the next-token loss, so that encoders and classifiers
need no labels and the dense model counts 0; AutoRound takes the absolute value batch by batch,
which grows with the number of batches.

Cost: see `cptq.sensitivity.path`, one place. Limits: grows about as |d| and as the noise in g, so
that it tells units apart better than candidates.
"""

from __future__ import annotations

from cptq.sensitivity.along import Along
from cptq.sensitivity.metric import Needs
from cptq.sensitivity.path import Term


class DeltaLoss(Along):
    """Absolute gradient at Q(W) times the absolute change."""

    needs = Needs(path=(1.0,))

    def combine(self, terms: list[Term]) -> float:
        """sum |g_Q d|."""
        return terms[0].magnitude
