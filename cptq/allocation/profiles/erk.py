"""`erk`: the larger a matrix, the fewer of its weights stay.

    density_l = min(1, c (n_in + n_out) / (n_in n_out)),      c such that the mean is as asked

Source: Erdős-Rényi-kernel, of which linears have no kernel part (Evci et al., RigL, arXiv
1911.11134, section 3), which follows SET (Mocanu et al., arXiv 1707.04780). Departure: the layers
of a fused unit share one density, that of their shapes put together by weights.

Cost: none. Limits: made for training from scratch; it knows nothing but shapes, so that in a
transformer it mostly tells attention from the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.profiles import Profile, UnitFacts, scale_to_mean


def compute(facts: Sequence[UnitFacts], density: float) -> list[float]:
    """Return densities by shape."""
    weights = [
        sum(out + inputs for out, inputs in fact.shapes)
        / sum(out * inputs for out, inputs in fact.shapes)
        for fact in facts
    ]
    return scale_to_mean(weights, [fact.size for fact in facts], density)


PROFILE = Profile(compute=compute, reads="shapes")
