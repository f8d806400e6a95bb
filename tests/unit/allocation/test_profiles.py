"""What every sparsity profile must do, and each against its formula."""

from __future__ import annotations

import pytest

from cptq.allocation.profiles import PROFILES, UnitFacts, spread
from cptq.types import Candidate
from tests.reference import sparsity as truth

SHAPES = [(64, 64), (172, 64), (64, 172), (8, 64), (300, 64)]
FACTS = [
    UnitFacts(
        shapes=(shape,),
        size=4 * shape[0] * shape[1],
        pq_index=0.2 + 0.1 * place,
        outlier_ratio=0.01 * place**2,
    )
    for place, shape in enumerate(SHAPES)
]
SIZES = [fact.size for fact in FACTS]


def mean(densities: list[float]) -> float:
    return sum(d * n for d, n in zip(densities, SIZES, strict=True)) / sum(SIZES)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", list(PROFILES))
def test_densities_have_the_mean_that_is_asked(name: str, density: float) -> None:
    found = PROFILES.get(name).compute(FACTS, density)
    assert all(0 < d <= 1 for d in found)
    assert mean(found) == pytest.approx(density, abs=1e-9 if name != "owl" else 0.02)


def test_each_equals_its_formula() -> None:
    erk = [(out + inputs) / (out * inputs) for out, inputs in SHAPES]
    assert PROFILES.get("erk").compute(FACTS, 0.6) == pytest.approx(
        truth.capped_shares(erk, SIZES, 0.6)
    )
    indices = [fact.pq_index or 0 for fact in FACTS]
    zeros = truth.capped_shares([i / 0.9 for i in indices], SIZES, 0.5 / 0.9)
    assert PROFILES.get("pq-adaptive").compute(FACTS, 0.5) == pytest.approx(
        [1 - 0.9 * share for share in zeros]
    )
    alike = [UnitFacts(shapes=((4, 4),), size=16, outlier_ratio=r) for r in (0.1, 0.4, 0.2)]
    assert PROFILES.get("owl").compute(alike, 0.5) == pytest.approx(
        truth.owl_densities([0.1, 0.4, 0.2], 0.5, 0.08)
    )


@pytest.mark.parametrize("label", ["w4c-s50", "w4c-4:8"])
def test_spreading_rounds_within_the_bytes_and_wastes_little(label: str) -> None:
    choices = {str(i): Candidate.parse(label) for i in range(len(FACTS))} | {"x": Candidate(bits=8)}
    steps = 8 if ":" in label else 100

    def count(tried: dict[str, Candidate]) -> float:
        return sum((1 - tried[str(i)].sparsity) * size for i, size in enumerate(SIZES))

    densities = PROFILES.get("erk").compute(FACTS, 0.5)
    wanted = {str(i): d for i, d in enumerate(densities)}
    found = spread(choices, wanted, lambda tried: count(tried) <= 0.5 * sum(SIZES))
    assert count(found) <= 0.5 * sum(SIZES)
    assert count(found) >= 0.5 * sum(SIZES) - max(SIZES) / steps
    assert found["x"] == choices["x"]
    for unit, density in wanted.items():
        assert abs(1 - found[unit].sparsity - density) <= 1 / steps + 1e-9
        assert found[unit].dense is False
        assert Candidate.parse(found[unit].label) == found[unit]
