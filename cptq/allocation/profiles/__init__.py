"""How the zeros of a plan are spread over the layers that are sparse in it, one file a profile.

A profile gives every sparse unit a density, the share of weights that stay, so that their mean over
the bits that units store is that of the plan: what some layers keep more, others keep less, and
the file stays as large. `spread` then rounds to what a candidate can say (whole percents; N of M)
without exceeding the bytes of the plan, and the largest remainders get what is left.

Which units are sparse at all, and in how many bits, is the allocator's choice: that is the
knapsack's own profile, by measured scores, with several shares offered (`--sparsity 30%,50%,70%`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cptq.registry import Registry
from cptq.types import Candidate, compute_share


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFacts:
    """What profiles read of a unit; `size` are the bits it would store without sparsity.

    `pq_index` is that of its weights (mean over its layers' weights), `outlier_ratio` that of its
    block; None where the profile does not ask for it.
    """

    shapes: tuple[tuple[int, int], ...]
    size: int
    pq_index: float | None = None
    outlier_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`compute` returns the densities of units whose mean over `size` is the given one.

    `reads`: whether facts about shapes, weights or the inputs of layers are needed.
    """

    compute: Callable[[Sequence[UnitFacts], float], list[float]]
    reads: Literal["shapes", "weights", "inputs"]


#: --sparsity-profile
PROFILES: Registry[Profile] = Registry(
    "sparsity profile",
    {
        "uniform": "cptq.allocation.profiles.uniform:PROFILE",
        "erk": "cptq.allocation.profiles.erk:PROFILE",
        "owl": "cptq.allocation.profiles.owl:PROFILE",
        "pq-adaptive": "cptq.allocation.profiles.pq_adaptive:PROFILE",
    },
)


def scale_to_mean(
    weights: Sequence[float], sizes: Sequence[int], mean: float, cap: float = 1.0
) -> list[float]:
    """Return min(cap, c w_l) with c such that their mean over `sizes` is `mean`.

    Those that reach the cap stay there and the others share the rest, until none reaches it.
    """
    total, capped = mean * sum(sizes), set[int]()
    while True:
        free = [i for i in range(len(sizes)) if i not in capped]
        left = total - cap * sum(sizes[i] for i in capped)
        mass = sum(weights[i] * sizes[i] for i in free)
        c = left / mass if mass > 0 else 0.0
        above = [i for i in free if c * weights[i] > cap]
        if not above:
            return [cap if i in capped else c * weights[i] for i in range(len(sizes))]
        capped.update(above)


def spread(
    choices: Mapping[str, Candidate],
    densities: Mapping[str, float],
    fits: Callable[[Mapping[str, Candidate]], bool],
) -> dict[str, Candidate]:
    """Return the choices with other shares of zeros, that `fits`.

    Args:
        choices: a plan's.
        densities: {sparse unit: share of its weights that should stay}.
        fits: whether choices take no more bytes than they may.
    """
    steps = {unit: _count_steps(choices[unit]) for unit in densities}
    wanted = {unit: share * steps[unit] for unit, share in densities.items()}
    kept = {unit: max(1, min(steps[unit], int(want))) for unit, want in wanted.items()}

    def build() -> dict[str, Candidate]:
        return {**choices, **{u: _set_kept(choices[u], k, steps[u]) for u, k in kept.items()}}

    while not fits(build()) and max(kept.values()) > 1:
        largest = max(kept, key=lambda unit: kept[unit] / steps[unit])
        kept[largest] -= 1
    order = sorted(wanted, key=lambda unit: kept[unit] - wanted[unit])
    for unit in order:
        if kept[unit] < min(steps[unit], wanted[unit]):
            kept[unit] += 1
            if not fits(build()):
                kept[unit] -= 1
    return build()


def _count_steps(candidate: Candidate) -> int:
    """Return how many densities a candidate's pattern tells apart: M of N:M, or percents."""
    return candidate.kept_of[1] if candidate.kept_of else 100


def _set_kept(candidate: Candidate, kept: int, steps: int) -> Candidate:
    """Return the candidate with `kept` of `steps` parts of the weights stored."""
    if kept == steps:
        return replace(candidate, sparsity=0.0, pattern="none")
    if candidate.kept_of is None:
        return replace(candidate, sparsity=(steps - kept) / 100)
    pattern = f"{kept}:{steps}"
    return replace(candidate, pattern=pattern, sparsity=compute_share(pattern))
