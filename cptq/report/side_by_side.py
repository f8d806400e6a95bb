"""Several models measured by the same tasks, as one immutable value, and which of them are best.

The first model is the one that others are held to. A model is on the size-quality front (Pareto's)
if no other is at most as large and at least as good, one of the two strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from cptq.report.summary import plain
from cptq.types import EvalResult, Notice, PairedDifference

#: version of the layout of compare.json
SCHEMA = 1
#: tasks that say what a model costs, and not how good it is
COSTS = ("size", "load", "memory", "speed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """One model: `weight_bytes` of its files (None: not known), bits per weight with scales
    (`effective_bits`, of an artifact), and what was measured."""

    name: str
    source: str
    kind: str
    parameters: int
    weight_bytes: int | None
    effective_bits: float | None
    results: tuple[EvalResult, ...]
    paired: tuple[PairedDifference, ...] = ()

    @property
    def file_bits(self) -> float | None:
        """Bits of the whole file over all parameters."""
        known = self.weight_bytes is not None and self.parameters
        return 8 * (self.weight_bytes or 0) / self.parameters if known else None

    def find(self, task: str, metric: str) -> EvalResult | None:
        """The result of a metric of a task."""
        return next((r for r in self.results if (r.task, r.metric) == (task, metric)), None)

    def cost(self, task: str, *metrics: str) -> float | None:
        """The first of some metrics of a cost that was measured."""
        found = (self.find(task, metric) for metric in metrics)
        return next((result.value for result in found if result is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """What `cptq compare` found; `quality` is the (task, metric) that the front is drawn by."""

    command_line: str
    models: tuple[ComparedModel, ...]
    quality: tuple[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    notices: tuple[Notice, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def baseline(self) -> ComparedModel:
        """The first model."""
        return self.models[0]

    def measured(self, model: ComparedModel) -> EvalResult | None:
        """A model's result of `quality`."""
        return model.find(*self.quality)

    @property
    def higher_is_better(self) -> bool:
        """Of `quality`."""
        found = [result for model in self.models if (result := self.measured(model))]
        return found[0].higher_is_better

    def on_front(self, model: ComparedModel) -> bool:
        """Whether no other model is smaller or as small, and better or as good."""
        points = {other.name: self._point(other) for other in self.models}
        mine = points[model.name]
        others = [point for point in points.values() if point is not None]
        return mine is not None and not any(dominates(point, mine) for point in others)

    def _point(self, model: ComparedModel) -> tuple[float, float] | None:
        """(bytes, loss), both better when lower."""
        result = self.measured(model)
        if model.weight_bytes is None or result is None or not isfinite(result.value):
            return None
        sign = -1.0 if result.higher_is_better else 1.0
        return float(model.weight_bytes), sign * result.value

    def to_dict(self) -> dict[str, Any]:
        """Plain data for compare.json."""
        data = {item.name: plain(getattr(self, item.name)) for item in fields(self)}
        for row, model in zip(data["models"], self.models, strict=True):
            row |= {"file_bits": model.file_bits, "on_front": self.on_front(model)}
            for told, pair in zip(row["paired"], model.paired, strict=True):
                told |= {"at_most_worse": pair.at_most_worse, "verdict": pair.verdict}
        return {"schema": SCHEMA, **data}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOutcome:
    """What `compare` hands back; `reports` maps "json", "html" and "svg" to files."""

    side_by_side: SideBySide
    out: Path | None = None
    reports: Mapping[str, Path] = field(default_factory=dict)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a (bytes, loss) is nowhere worse and somewhere better."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def shared_quality(results: Sequence[Sequence[EvalResult]]) -> tuple[str, str] | None:
    """The first (task, metric) of quality that every model was measured by."""
    keys = [[(r.task, r.metric) for r in rows if r.task not in COSTS] for rows in results]
    return next((key for key in keys[0] if all(key in other for other in keys[1:])), None)
