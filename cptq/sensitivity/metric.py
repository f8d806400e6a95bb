"""What a metric is: the base of all of them and what the driver hands them.

A metric sees one unit at a time: first `unit`, then `candidate` for each way to store it. Weights,
samples and rounding errors are computed once by the driver and shared, and so is what several
metrics derive from them (`UnitView.memo`, `Context.memo`); a metric keeps what it derives from a
unit only until the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor

from cptq.calibration.objective import Objective
from cptq.calibration.probe import Probe
from cptq.calibration.samples import LayerSample, Samples, Wants
from cptq.checkpoint.model import LoadedModel
from cptq.sensitivity.path import PathGradients
from cptq.sensitivity.rounding import Rounding
from cptq.types import Candidate, Emit, Unit

T = TypeVar("T")


class Memo:
    """Values that several metrics derive from the same thing, each computed once."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value under `key`; call `make` for it the first time."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the driver must prepare: a sampling pass, a held-out probe, gradients on a path.

    `path` holds the places t at which gradients in the model W + t (Q(W) - W) are wanted;
    `rounding` says that W - Q(W) of every unit and candidate is.
    """

    samples: Wants | None = None
    probe: bool = False
    path: tuple[float, ...] = ()
    rounding: bool = False

    @property
    def text(self) -> bool:
        """Whether anything must flow through the model; weights alone are enough otherwise."""
        return self.samples is not None or self.probe or bool(self.path)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What all units have in common; `samples`, `probe` and `path` are None unless needed.

    `calibration_tokens` is how many tokens a compressor will have.
    """

    model: LoadedModel
    objective: Objective
    samples: Samples | None
    probe: Probe | None
    path: PathGradients | None
    rounding: Rounding
    candidates: Sequence[Candidate]
    calibration_tokens: int
    seed: int
    emit: Emit
    memo: Memo = field(default_factory=Memo)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitView:
    """One unit: weights W_OI (float32) and samples of its layers, in the order of `unit.layers`.

    Layers that read the same input share one `x_TI` object. `samples` is empty where no metric
    asked for any.
    """

    unit: Unit
    weights: tuple[Tensor, ...]
    samples: tuple[LayerSample, ...] = field(default=())
    memo: Memo = field(default_factory=Memo)


class Metric(ABC):
    """One way to score. Scores are per candidate; higher = worse if compressed."""

    needs: ClassVar[Needs] = Needs()

    def __init__(self, context: Context) -> None:
        self.context = context

    @classmethod
    def least_tokens(cls, model: LoadedModel) -> int:
        """Fewest calibration tokens with which the metric means anything."""
        return 1

    @property
    @abstractmethod
    def score_unit(self) -> str:
        """What a score is measured in."""

    @abstractmethod
    def unit(self, view: UnitView) -> float:
        """The metric's number for a unit, whatever the candidate."""

    @abstractmethod
    def candidate(self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]) -> float:
        """The score of storing a unit as a (not dense) candidate.

        Args:
            view: the unit that `unit` was last called with.
            candidate: how it would be stored.
            errors: W - Q(W) of each of its layers, (out, in), nearest rounding; empty where no
                metric `needs` the rounding.
        """

    def finish(self) -> None:  # noqa: B027 - most metrics have nothing to add
        """All units have been scored: what is measured of the model as a whole comes here."""

    def per_block(self, per_unit: Mapping[str, float]) -> dict[int, float]:
        """Block index -> the sum over its units; a metric with a better idea overrides this.

        A block that lacks a unit in `per_unit` (an interrupted measurement) is left out.
        """
        sums: dict[int, float] = {}
        lacking: set[int] = set()
        for unit in self.context.model.units:
            if unit.block is None:
                continue
            if unit.name in per_unit:
                sums[unit.block] = sums.get(unit.block, 0.0) + per_unit[unit.name]
            else:
                lacking.add(unit.block)
        return {block: total for block, total in sums.items() if block not in lacking}

    def details(self) -> dict[str, Any]:
        """What a reader of the table must know, as plain data, without times."""
        return {}
