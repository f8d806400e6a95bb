"""`taylor-quantized`: the Taylor expansion taken at the quantized weights.

    score = 1/2 g_Q . (Q(W) - W),      g_Q = gradient of L in the model with every unit at Q(W)

L = KL(dense || model), whose gradient at W is 0. Where L is quadratic on the path, L = 1/2 d F d
with d = Q(W) - W, the gradient at its end is g_Q = F d with the whole F, products between
weights, layers and units included, and 1/2 g_Q . d is exactly the cost of a unit when everything is
rounded to the same candidate: the scores of all units add up to the divergence of that model. It
is the trapezoid rule for the integral of `taylor-integrated`.

Why not at W: there the first order vanishes, and a second order by a diagonal Fisher omits the
products (arXiv 2503.01901 finds gradient and Hessian at W off by orders of magnitude).

Cost: see `cptq.sensitivity.path_metric`, one point. Limits: far from quadratic at 2 bits; a unit is
scored in a model whose other units are rounded, too, not alone as by `kl`; scores below 0 (a unit
that compensates for others) are set to 0 and counted.
"""

from __future__ import annotations

from cptq.sensitivity.metric import Needs
from cptq.sensitivity.path_metric import PathMetric, Term


class TaylorQuantized(PathMetric):
    """Half the gradient at Q(W), in the direction of the rounding error."""

    needs = Needs(path=(1.0,))

    def combine(self, terms: list[Term]) -> float:
        """Return 1/2 g_Q . d."""
        return terms[0].directional / 2
