"""`delta-loss` (AutoRound): the gradient in the quantized model times the rounding error.

    score = sum_ki |g_Q,ki (W_ki - Q(W)_ki)|,      g_Q = gradient of L with every unit at Q(W)

as Intel's AutoRound scores schemes for mixed precision (AutoScheme; SignRoundV2,
arXiv 2512.04746): one backward pass per bit-width, with the whole model rounded to it, gives the
gradients of all units. The absolute value is taken per weight, after the gradient has been summed
over all tokens: an upper bound of |g_Q . d| that ignores cancellation between weights.

Departures: L is KL(dense || model) instead of the next-token loss, so that encoders and classifiers
need no labels and the dense model scores 0; AutoRound takes the absolute value batch by batch,
which grows with the number of batches.

Cost: see `cptq.sensitivity.path_metric`, one point. Limits: grows about as |d| and as the noise in
g, so it ranks units better than candidates.
"""

from __future__ import annotations

from cptq.sensitivity.metric import Needs
from cptq.sensitivity.path_metric import PathMetric, Term


class DeltaLoss(PathMetric):
    """Absolute gradient at Q(W) times the absolute rounding error."""

    needs = Needs(path=(1.0,))

    def combine(self, terms: list[Term]) -> float:
        """Return sum |g_Q d|."""
        return terms[0].absolute
