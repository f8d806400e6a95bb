"""The base class of all metrics, and what the driver hands to them.

A metric sees one unit at a time: first `measure_unit`, then `score_candidate` for each way to store
it. Units come block by block, in forward order within a block; the blocks from the last to the
first where any metric needs gradients, else from the first to the last. Weights, samples and
rounding errors are computed once by the driver and shared, and so is what several metrics derive
from them (`UnitView.memo`, `Context.memo`); what a metric derives from a unit it keeps only until
the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from torch import Tensor

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import Objective
from cptq.calibration.recorder import LayerActivations, LayerSample, SampleRequest
from cptq.calibration.samples import SamplePass
from cptq.checkpoint.model import LoadedModel
from cptq.sensitivity.rounding import NearestRounding
from cptq.types import Candidate, Emit, Keep, Unit, keep_nothing

if TYPE_CHECKING:
    from cptq.sensitivity.path_metric import PathGradients

T = TypeVar("T")


#: (unit, candidate) -> {layer name: W_OI}
Compress = Callable[[Unit, Candidate], Mapping[str, Tensor]]


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
    """What the driver must prepare for a metric.

    `samples`: a sampling pass. `divergence`: the dense model's outputs on held-out rows. `path`:
    gradients of the model at W + t (Q(W) - W), one t per entry. `rounding`: W - Q(W) of every unit
    and candidate.
    """

    samples: SampleRequest | None = None
    divergence: bool = False
    path: tuple[float, ...] = ()
    rounding: bool = False

    @property
    def text(self) -> bool:
        """Whether anything must flow through the model; weights alone are enough otherwise."""
        return self.samples is not None or self.divergence or bool(self.path)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What all units have in common; `samples`, `divergence` and `path` are None unless needed.

    `samples` is the pass that the driver walks through; what it keeps of a unit is in `UnitView`.
    `calibration_tokens` is how many tokens a compressor will have. `compress` gives {layer: W_OI}
    of a unit stored as a candidate by the compressor of the run, where a metric wants that. `keep`
    keeps what takes long and is not of one unit, such as the trials of `measure_model`.
    """

    model: LoadedModel
    objective: Objective
    samples: SamplePass | None
    divergence: DivergenceFromDense | None
    path: PathGradients | None
    rounding: NearestRounding
    candidates: Sequence[Candidate]
    calibration_tokens: int
    compress: Compress | None = None
    seed: int
    emit: Emit
    keep: Keep = keep_nothing
    memo: Memo = field(default_factory=Memo)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitView:
    """One unit: weights W_OI (float32) and samples of its layers, in the order of `unit.layers`.

    Layers that read the same input share one `x_TI` object. `samples` is empty where no metric
    needs any, and so is `activations`, in the order of the layers, too.
    """

    unit: Unit
    weights: tuple[Tensor, ...]
    samples: tuple[LayerSample, ...] = field(default=())
    activations: tuple[LayerActivations, ...] = field(default=())
    memo: Memo = field(default_factory=Memo)


class Metric(ABC):
    """One way to score. Scores are per candidate; higher = worse if compressed.

    A metric that is resumed does not see the units that were scored before. What it must know of
    them for the details of its table stands in `facts`: {unit name: plain data}, in forward order
    once all units are scored.
    """

    needs: ClassVar[Needs] = Needs()

    def __init__(self, context: Context) -> None:
        self.context = context
        self.facts: dict[str, Any] = {}

    @classmethod
    def get_min_tokens(cls, model: LoadedModel) -> int:
        """Return the fewest calibration tokens with which the metric is meaningful."""
        return 1

    @property
    @abstractmethod
    def score_unit(self) -> str:
        """The unit of measurement of the scores."""

    @abstractmethod
    def measure_unit(self, view: UnitView) -> float:
        """Return the metric's candidate-free number of a unit."""

    @abstractmethod
    def score_candidate(
        self, view: UnitView, candidate: Candidate, errors: tuple[Tensor, ...]
    ) -> float:
        """Return the score of storing a unit as a (not dense) candidate.

        Args:
            view: the unit that `measure_unit` was last called with.
            candidate: how it would be stored.
            errors: W - Q(W) of each of its layers, (out, in), nearest rounding; empty where no
                metric `needs` the rounding.
        """

    def score_outer(
        self,
        view: UnitView,
        candidate: Candidate,
        divergence: float,
        per_unit: Mapping[str, float],
    ) -> float:
        """Return the score of storing a unit outside the blocks as a (not dense) candidate.

        Asked of metrics that read text alone, which take the measured divergence; the others score
        such a unit as every unit.

        Args:
            view: the unit: the token embedding or the output head.
            candidate: how it would be stored.
            divergence: measured with this unit alone changed.
            per_unit: the metric's numbers of all units in blocks.
        """
        return divergence

    def measure_model(self) -> None:  # noqa: B027 - most metrics have nothing to add
        """Measure what concerns the model as a whole, after all units have been scored."""

    def aggregate_blocks(self, per_unit: Mapping[str, float]) -> dict[int, float]:
        """Return block index -> number of the block; the sum over its units unless overridden."""
        sums: dict[int, float] = {}
        for unit in self.context.model.units:
            if unit.block is not None:
                sums[unit.block] = sums.get(unit.block, 0.0) + per_unit[unit.name]
        return sums

    def collect_details(self) -> dict[str, Any]:
        """Return what a reader of the table must know, as plain data, without times."""
        return {}
