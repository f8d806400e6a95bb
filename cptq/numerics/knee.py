"""Find the knee of a rising curve: the point farthest below its chord.

    knee = argmax_p (p - p_0) / (p_n - p_0) - (s(p) - s(p_0)) / (s(p_n) - s(p_0))

for a curve s over p_0 < ... < p_n: both axes scaled to [0, 1], the point at which the curve lies
deepest below the straight line from its first to its last point, which is where its slope passes
that of the line. Source: Satopää et al., "Finding a 'Kneedle' in a Haystack" (ICDCS workshops,
2011), for convex rising curves; without its smoothing and threshold, as the curve is not a stream.

Cost: one pass. Limits: the knee depends on the ends of the range (that of p^n on [0, 1] lies at
n^(-1/(n-1)): 0.5, 0.58, 0.63 for n = 2, 3, 4); a straight or concave curve has no knee.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

#: depth below the chord, as a share of its height, under which a curve counts as straight
FLAT = 1e-6


def find_knee(places: Sequence[float], values: Sequence[float]) -> int | None:
    """Return the index of the knee; None if there is none. The first of equal ones.

    Raises:
        ValueError: fewer than two points, or places that do not rise.
    """
    if len(places) < 2 or len(places) != len(values):
        raise ValueError("a curve needs at least two points, and a value at each place")
    if any(b <= a for a, b in pairwise(places)):
        raise ValueError("the places of a curve must rise")
    width, height = places[-1] - places[0], values[-1] - values[0]
    if height <= 0:
        return None
    depths = [
        (p - places[0]) / width - (s - values[0]) / height
        for p, s in zip(places, values, strict=True)
    ]
    deepest = max(range(len(depths)), key=depths.__getitem__)
    return deepest if depths[deepest] > FLAT else None
