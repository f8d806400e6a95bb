"""Carry out --sparsity-score and --sparsity-profile."""

from __future__ import annotations

from dataclasses import replace

from cptq.allocation.experts import list_experts
from cptq.allocation.profiles import PROFILES, Profile, UnitFacts, spread
from cptq.checkpoint.weights import get_weight
from cptq.compression.scores import Masking
from cptq.config import CompressSettings
from cptq.numerics.inequality import compute_pq_index
from cptq.pipeline.inputs import CompressInputs
from cptq.sensitivity.sparsity.outliers import measure_outlier_ratios
from cptq.types import Candidate, Emit, Notice, Plan, Unit


def build_masking(settings: CompressSettings) -> Masking:
    """Return how the weights that sparse layers keep are chosen."""
    return Masking(score=settings.sparsity_score, seed=settings.calibration.seed)


def spread_zeros(inputs: CompressInputs, plan: Plan, emit: Emit) -> Plan:
    """Return the plan with its zeros spread over its sparse units by the profile.

    It takes no more bytes. A predicted loss is dropped, as no score was measured at the new shares.
    """
    name, cost = inputs.settings.sparsity_profile, inputs.space.cost
    sparse = [unit for unit in inputs.model.units if plan.choices[unit.name].sparsity]
    if name == "uniform" or not sparse:
        if name != "uniform":
            message = "no unit of the plan is sparse, so there is nothing to spread"
            emit(Notice(kind="warning", subject="--sparsity-profile", message=message))
        return plan
    if list_experts(inputs.model.units):
        message = "experts share one scheme, so that their zeros cannot be spread: uniform"
        emit(Notice(kind="fallback", subject="--sparsity-profile", message=message))
        return plan
    profile = PROFILES.get(name)
    facts = _read_facts(inputs, profile, sparse, plan, emit)
    stored = sum((1 - plan.choices[u.name].sparsity) * facts[u.name].size for u in sparse)
    mean = stored / sum(fact.size for fact in facts.values())
    densities = profile.compute(list(facts.values()), mean)
    choices = spread(
        plan.choices,
        dict(zip(facts, densities, strict=True)),
        lambda tried: cost.file_bytes(tried) <= plan.predicted_bytes,
    )
    note = f"zeros of {len(sparse)} units spread by {name}: {_describe_range(choices, sparse)}"
    emit(Notice(kind="info", subject="--sparsity-profile", message=note))
    return replace(
        plan,
        choices=choices,
        predicted_bytes=cost.file_bytes(choices),
        predicted_loss=None,
        notes=(*plan.notes, note),
    )


def _describe_range(choices: dict[str, Candidate], units: list[Unit]) -> str:
    shares = [choices[unit.name].sparsity for unit in units]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def _read_facts(
    inputs: CompressInputs, profile: Profile, units: list[Unit], plan: Plan, emit: Emit
) -> dict[str, UnitFacts]:
    """Return what the profile reads of each unit."""
    ratios: dict[int, float] = {}
    if profile.reads == "inputs":
        seed = inputs.settings.calibration.seed
        ratios = measure_outlier_ratios(inputs.model, inputs.calibration, seed, emit)
    found = {}
    for unit in units:
        index = _measure_index(inputs, unit) if profile.reads == "weights" else None
        found[unit.name] = UnitFacts(
            shapes=tuple(spec.shape for spec in unit.layers),
            size=unit.numel * plan.choices[unit.name].bits,
            pq_index=index,
            outlier_ratio=None if unit.block is None else ratios.get(unit.block),
        )
    return found


def _measure_index(inputs: CompressInputs, unit: Unit) -> float:
    """Return the mean PQ Index of the unit's layers, by their weights."""
    parts = [
        compute_pq_index(get_weight(inputs.model.linear(spec.name)).float()) * spec.numel
        for spec in unit.layers
    ]
    return sum(parts) / unit.numel
