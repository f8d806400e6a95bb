"""Models that exist as shapes only, with random scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cptq.allocation.allocate import allocate
from cptq.allocation.cost import CostModel
from cptq.allocation.ledger import build_ledger
from cptq.allocation.targets import resolve_target
from cptq.config import RUNTIMES
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Budget, Candidate, Event, LayerSpec, Plan, SensitivityTable, TensorSpec, Unit

CANDIDATES = (
    *(Candidate(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8)),
    Candidate(bits=16),
)
#: fewer, where every plan is tried
FEW = tuple(Candidate(bits=bits, group_size=64) for bits in (2, 3, 4, 8))
W3, W4, W16 = (Candidate.parse(label) for label in ("w3g64", "w4g64", "w16"))
FINGERPRINT = "f" * 64


def ignore(_event: Event) -> None:
    """An `emit` for tests that check no events."""


def layer(name: str, shape: tuple[int, int], dtype: str = "F16", block: int = 0) -> LayerSpec:
    role = name.rsplit(".", 1)[-1]
    return LayerSpec(name=name, block=block, role=role, kind="linear", shape=shape, dtype=dtype)


def unit(name: str, *layers: LayerSpec) -> Unit:
    return Unit(name=name, block=layers[0].block, role=layers[0].role, layers=layers)


def model(
    count: int, *, dtype: str = "F16", seed: int = 0, sizes: Sequence[int] = (48, 64, 80, 130, 7)
) -> CostModel:
    """`count` units of odd shapes, every third a fused pair, beside an embedding and norms."""
    draw = random.Random(seed)
    tensors = [TensorSpec(name="model.embed.weight", dtype=dtype, shape=(97, sizes[0]))]
    units = []
    for i in range(count):
        inputs = draw.choice(sizes)
        shapes = [(draw.choice(sizes), inputs) for _ in range(2 if i % 3 == 2 else 1)]
        layers = [
            layer(f"model.layers.{i}.part{j}", shape, dtype, i) for j, shape in enumerate(shapes)
        ]
        units.append(unit(f"model.layers.{i}", *layers))
        tensors += [TensorSpec(name=x.weight_name, dtype=dtype, shape=x.shape) for x in layers]
        norm = f"model.layers.{i}.norm.weight"
        tensors.append(TensorSpec(name=norm, dtype=dtype, shape=(inputs,)))
    return CostModel(units, tensors)


def packed_model(
    count: int,
    *,
    seed: int = 0,
    sizes: Sequence[int] = (48, 64, 80, 130, 7),
    vocabulary: bool = False,
) -> CostModel:
    """`model` in the packed format, which holds sparse and asymmetric candidates as well.

    With `vocabulary` the embedding is a unit.
    """
    dense = model(count, seed=seed, sizes=sizes)
    units = list(dense.units)
    if vocabulary:
        units.append(embedding_unit(dense.tensors[0]))
    return CostModel(units, dense.tensors, PACKED_LAYOUT, RUNTIMES["cptq"])


def embedding_unit(tensor: TensorSpec) -> Unit:
    """The unit of an embedding that is the output head as well."""
    out, width = tensor.shape
    name = tensor.name.removesuffix(".weight")
    spec = LayerSpec(
        name=name, block=None, role="embed", kind="embedding", shape=(out, width),
        dtype=tensor.dtype, compressible=False,
    )  # fmt: skip
    return Unit(name=name, block=None, role="embedding+head", layers=(spec,))


def table(
    cost: CostModel,
    score: Callable[[str, Candidate], float],
    candidates: Sequence[Candidate] = CANDIDATES,
) -> SensitivityTable:
    scores = {u.name: {c: score(u.name, c) for c in candidates} for u in cost.units}
    return SensitivityTable(
        metric="output",
        score_unit="nats",
        scores=scores,
        per_unit={name: max(row.values()) for name, row in scores.items()},
        per_block={},
        model_fingerprint=FINGERPRINT,
        calibration_fingerprint="c" * 64,
        seed=0,
        tokens=1000,
        seconds=1.0,
    )


def random_table(
    cost: CostModel,
    seed: int = 0,
    candidates: Sequence[Candidate] = CANDIDATES,
    noise: float = 0.0,
) -> SensitivityTable:
    """Scores that fall by about 4 per bit, by units of very different sensitivity."""
    draw = random.Random(seed)
    weight = {u.name: draw.lognormvariate(0, 1.5) for u in cost.units}

    def score(name: str, candidate: Candidate) -> float:
        if candidate.dense:
            return 0.0
        return weight[name] * 4.0**-candidate.bits * draw.lognormvariate(0, noise)

    return table(cost, score, candidates)


def run(
    name: str,
    scores: SensitivityTable | None,
    cost: CostModel,
    budget: Budget | str,
    candidates: tuple[Candidate, ...] = CANDIDATES,
    events: list[Event] | None = None,
) -> Plan:
    """A plan by an allocator, for a budget or a target in words."""
    if isinstance(budget, str):
        ledger = resolve_target(budget, cost, 64, candidates)
    else:
        ledger = build_ledger(budget, cost, candidates)
    emit = ignore if events is None else events.append
    return allocate(name, scores, ledger, candidates, model_fingerprint=FINGERPRINT, emit=emit)
