"""Plans of several sizes beside each other, and the front of size against predicted loss.

`cptq plan` and `cptq compress --dry-run` show the same tables, made from a `PlanView`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log
from pathlib import Path
from typing import Any

from cptq.report.formatting import (
    Table,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_seconds,
    format_signed,
)
from cptq.report.summary import FrontPoint, ModelFacts, Summary, convert_to_plain
from cptq.types import (
    Candidate,
    Explanation,
    LayerSpec,
    Notice,
    Plan,
    SensitivityTable,
    SizeReport,
    Unit,
)

#: version of the layout of plans.json
SCHEMA = 1
#: targets in one table of roles, so that it fits 80 columns
PER_TABLE = 4
#: what the plan of a run is called among the plans of a front
CARRIED_OUT = "carried out"
#: letters of the longest bar
BAR = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTarget:
    """A plan for one target.

    `uniform_loss` is the predicted loss of the baseline plan of the same bytes (None: no scores),
    `seconds` what carrying the plan out is estimated to take (None: not estimated).
    """

    plan: Plan
    size: SizeReport
    uniform_loss: float | None = None
    seconds: float | None = None

    @property
    def target(self) -> str:
        """The target as typed."""
        return self.plan.budget.asked


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """Plans of a model. `score_unit`: of the losses; empty without scores."""

    units: tuple[Unit, ...]
    planned: tuple[PlannedTarget, ...]
    front: tuple[FrontPoint, ...] = ()
    score_unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlansOutcome:
    """Return value of `plan_targets`. `paths` {target: file}; empty where nothing was written.

    `table` holds the scores that the plans were made from.
    """

    model: ModelFacts
    command_line: str
    settings: Mapping[str, Any]
    view: PlanView
    table: SensitivityTable | None = None
    explanations: tuple[Explanation, ...] = ()
    notices: tuple[Notice, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    out: Path | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)

    @property
    def plans(self) -> dict[str, Plan]:
        """{target as typed: plan}."""
        return {found.target: found.plan for found in self.view.planned}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; the scores are in a file of their own."""
        data: dict[str, Any] = {"schema": SCHEMA, **convert_to_plain(self)}
        del data["table"]
        data["view"]["units"] = [unit.name for unit in self.view.units]
        return data


def list_roles(
    units: Iterable[Unit], choices: Mapping[str, Candidate]
) -> list[tuple[str, int, Counter[Candidate]]]:
    """Return (role, weights, {candidate: layers}) of a plan, in forward order."""
    found: dict[str, tuple[list[LayerSpec], Counter[Candidate]]] = {}
    for unit in units:
        if unit.name in choices:
            layers, counts = found.setdefault(unit.role, ([], Counter()))
            layers += unit.layers
            counts[choices[unit.name]] += len(unit.layers)
    return [
        (role, sum(layer.numel for layer in layers), counts)
        for role, (layers, counts) in found.items()
    ]


def build_view_tables(view: PlanView) -> list[Table]:
    """Build the tables of sizes and losses, of bits by role, and of the front."""
    starts = range(0, len(view.planned), PER_TABLE)
    roles = (
        [_build_layer_table(view)]
        if len(view.planned) == 1
        else [_build_role_table(view, view.planned[i : i + PER_TABLE]) for i in starts]
    )
    names = {found.plan.predicted_bytes: found.target for found in view.planned}
    front = [_build_front_table(view.front, names)] if view.front else []
    return [_build_size_table(view), *roles, *front]


def _build_size_table(view: PlanView) -> Table:
    rows = [
        (
            found.target,
            f"{found.plan.predicted_bytes:,}",
            format_percent(found.plan.predicted_bytes / found.size.dense_file_bytes),
            f"{found.size.effective_bits:.3f}",
            format_number(found.plan.predicted_loss),
            format_number(found.uniform_loss),
            "-" if found.seconds is None else format_seconds(found.seconds),
        )
        for found in view.planned
    ]
    first = view.planned[0]
    how = first.plan.allocator + (f" with {first.plan.metric} scores" if first.plan.metric else "")
    loss = f"loss: predicted, {view.score_unit}; " if view.score_unit else ""
    uniform = "even: that of the plan of equal bits; " if view.score_unit else ""
    return Table(
        title=f"Plan: {how}" if len(view.planned) == 1 else f"Plans: {how}",
        columns=("target", "bytes", "of 16 bit", "bits", "loss", "even", "time"),
        rows=tuple(rows),
        right=("bytes", "of 16 bit", "bits", "loss", "even", "time"),
        note=f"bytes: {first.size.file}; bits: per compressed weight, scales included; {loss}"
        f"{uniform}time: to compress by the plan, estimated",
    )


def _build_layer_table(view: PlanView) -> Table:
    (found,) = view.planned
    rows = [
        (
            role,
            format_count(weights),
            ", ".join(f"{count} x {c.label}" for c, count in sorted(counts.items())),
        )
        for role, weights, counts in list_roles(view.units, found.plan.choices)
    ]
    return Table(
        title="Bits by role",
        columns=("role", "weights", "layers stored as"),
        rows=tuple(rows),
        right=("weights",),
    )


def _build_role_table(view: PlanView, planned: Sequence[PlannedTarget]) -> Table:
    """Build the mean bits of each role in each plan, with the least and the most."""
    columns = [dict(_average_bits(view.units, found.plan.choices)) for found in planned]
    weights = {role: n for role, n, _ in list_roles(view.units, planned[0].plan.choices)}
    targets = tuple(found.target for found in planned)
    return Table(
        title="Bits by role: mean (least to most)",
        columns=("role", "weights", *targets),
        rows=tuple(
            (role, format_count(count), *(column[role] for column in columns))
            for role, count in weights.items()
        ),
        right=("weights", *targets),
        note="bits of the codes, without scales; 16: dense",
    )


def _average_bits(
    units: Iterable[Unit], choices: Mapping[str, Candidate]
) -> Iterable[tuple[str, str]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for unit in units:
        if unit.name in choices:
            found.setdefault(unit.role, []).append((unit.numel, choices[unit.name].bits))
    for role, rows in found.items():
        mean = sum(n * bits for n, bits in rows) / max(1, sum(n for n, _ in rows))
        low, high = min(bits for _, bits in rows), max(bits for _, bits in rows)
        yield role, f"{mean:.2f}" + (f" ({low} to {high})" if low < high else "")


def build_front_table(summary: Summary) -> Table | None:
    """Build the front of a run's measurement, its own plan marked; None without."""
    if not summary.front or summary.plan is None:
        return None
    return _build_front_table(summary.front, {summary.plan.predicted_bytes: CARRIED_OUT})


def _build_front_table(front: Sequence[FrontPoint], names: Mapping[int, str]) -> Table:
    losses = [point.loss for point in front if point.loss > 0 and isfinite(point.loss)]
    rows = [
        (
            format_bytes(point.nbytes),
            f"{point.bits:.2f}",
            format_number(point.loss, 3),
            format_number(point.uniform, 3),
            _draw_bar(point.loss, losses),
            names.get(point.nbytes, ""),
        )
        for point in front
    ]
    return Table(
        title="Size against predicted loss",
        columns=("size", "bits", "loss", "even", "loss, log scale", "target"),
        rows=tuple(rows),
        right=("size", "bits", "loss", "even"),
        note="each row is another plan: type its size as --target; 16 bits predict no loss",
    )


def _draw_bar(loss: float, losses: Sequence[float]) -> str:
    """Return a bar whose length is the logarithm of a loss between the least and the largest."""
    if loss <= 0 or not losses:
        return ""
    low, high = log(min(losses)), log(max(losses))
    share = (log(loss) - low) / (high - low) if high > low else 1.0
    return "█" * (1 + round(share * (BAR - 1)))


def build_explanation_table(found: Explanation) -> Table:
    """Build the options of a unit: their bytes and predicted loss against the chosen one."""
    rows = [
        (
            step.candidate.label,
            "chosen" if step.nbytes == 0 and step.loss == 0 else f"{step.nbytes:+,}",
            format_signed(step.loss) if step.nbytes or step.loss else "",
            "" if step.rate is None else format_number(1000 * step.rate, 3),
        )
        for step in found.steps
    ]
    price = "" if found.price is None else format_number(1000 * found.price, 3)
    least = "" if found.least is None else format_number(1000 * found.least, 3)
    compare = f"; the best step left out of any unit takes off {price} per kB" if price else ""
    compare += f", the cheapest step back of another unit costs {least}" if least else ""
    return Table(
        title=f"{found.unit} at {found.target}: {format_count(found.weights)} weights, "
        f"predicted loss {format_number(found.score)}",
        columns=("stored as", "bytes", "loss", "per kB"),
        rows=tuple(rows),
        right=("bytes", "loss", "per kB"),
        note=f"{found.spell_reason()}{compare}",
    )
