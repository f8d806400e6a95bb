"""`uniform`: every layer keeps the same share."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.profiles import Profile, UnitFacts


def compute(facts: Sequence[UnitFacts], density: float) -> list[float]:
    """Return the mean for all."""
    return [density] * len(facts)


PROFILE = Profile(compute=compute, reads="shapes")
