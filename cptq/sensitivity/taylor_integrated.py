"""`taylor-integrated`: the loss gradient integrated along the path from W to Q(W).

    score = d . integral_0^1 g(W + t d) dt ~ d . (0 + 4 g(W + d/2) + g(W + d)) / 6,   d = Q(W) - W

with g the gradient of L = KL(dense || model) and all units moved together. This is the
post-quantization integral of Hu et al. (arXiv 2503.01901, PQI: no local expansion holds as far as
Q(W), so the gradient is integrated) per unit instead of per weight, and, with W as the baseline,
the integrated gradients of Sundararajan et al. (arXiv 1703.01365): the scores of all units add up
to L(Q(W)) exactly, up to the rule.

The rule is Simpson's, exact for gradients up to the third degree in t; g(W) = 0 is free, and the
gradient at Q(W) is the one that `taylor-quantized` and `delta-loss` use.

Departures: the paper uses the next-token loss and more steps, and scores single weights; here a
unit's terms are added with their signs, so that gains and losses of its weights cancel, as they do
in the model (`delta-loss` has the absolute form).

Cost: see `cptq.sensitivity.path_metric`, two points. Limits: as `taylor-quantized`, except that the
loss need not be quadratic.
"""

from __future__ import annotations

from cptq.sensitivity.metric import Needs
from cptq.sensitivity.path_metric import PathMetric, Term

#: Simpson's weights; the gradient at 0 is 0
WEIGHTS = {0.5: 4 / 6, 1.0: 1 / 6}


class TaylorIntegrated(PathMetric):
    """The gradient along the path to Q(W), by Simpson's rule."""

    needs = Needs(path=tuple(WEIGHTS))

    def combine(self, terms: list[Term]) -> float:
        """Return d . (4 g_half + g_Q) / 6."""
        pairs = zip(WEIGHTS.values(), terms, strict=True)
        return sum(weight * term.directional for weight, term in pairs)
