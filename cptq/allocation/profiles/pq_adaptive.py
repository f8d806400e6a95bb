"""`pq-adaptive`: the more unequal a unit's weights, the more of them go.

    zeros_l = min(beta, c I_l),      beta = 0.9, c such that the mean is as asked

with I the PQ Index of the unit's weights (p = 1/2, q = 1). For these p and q the bound of SAP says
that at least d (1 - I) of d weights must stay, so I is the largest share that may go (Diao et al.,
arXiv 2302.05601, theorem 2 with eta = 0, and algorithm 1, which drops gamma times that share and at
most beta).

Departures: SAP prunes in rounds with retraining and with one gamma; here there is one round, and c,
in gamma's place, is solved for the share that is asked. Cost: one pass over the weights. Limits: as
those of the index, which considers neither inputs nor loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.profiles import Profile, UnitFacts, scale_to_mean

#: most that goes of a unit, unless the share that is asked is larger
BETA = 0.9


def compute(facts: Sequence[UnitFacts], density: float) -> list[float]:
    """Return densities by PQ Index."""
    weights = [max(fact.pq_index or 0.0, 1e-6) for fact in facts]
    cap = max(BETA, 1 - density)
    zeros = scale_to_mean(weights, [fact.size for fact in facts], 1 - density, cap)
    return [1 - share for share in zeros]


PROFILE = Profile(compute=compute, reads="weights")
