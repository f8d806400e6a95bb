"""What `cptq compress --dry-run` found: what a run would write, hold and take, as tables and JSON.

Bytes are those of the files and of numbers in memory; seconds are scaled from a probe of a single
block and a single layer, and said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptq.report.formatting import (
    Table,
    format_bytes,
    format_bytes_exact,
    format_count,
    format_seconds,
    tabulate_pairs,
)
from cptq.report.plans import PlanView, build_view_tables, list_roles
from cptq.report.summary import ModelFacts, convert_to_plain
from cptq.types import Budget, Notice, Plan, SizeReport, Unit

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """How a limit on memory is shared out, in bytes.

    `weights` and `activations` are the most that each may take, `whole` what the weights take that
    come and go, and `least` about the least limit with which a run works.
    """

    total: int
    asked: bool
    weights: int
    activations: int
    whole: int
    least: int
    held_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """Bytes that a run takes on the disk of `place`, at most, and what is free there.

    `output` is the weight files, `run` the finished steps, `spilled` activations that wait.
    """

    place: Path
    output: int
    run: int
    spilled: int
    free: int

    @property
    def need(self) -> int:
        """All of them, which are there together at the end of a run."""
        return self.output + self.run + self.spilled


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFacts:
    """Estimated seconds: {stage: seconds}, {what was timed: seconds}, and what is left out."""

    stages: Mapping[str, float]
    probe: Mapping[str, float]
    counted: str
    left_out: str

    @property
    def total(self) -> float:
        """Seconds of all stages that are counted."""
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would do. `view` holds the plan; None where it has to be measured first.

    `file_bytes` are those of the model's own files, `shard_bytes` the most of one weight file to be
    written; `dense` are notices about what stays in 16 bits.
    """

    model: ModelFacts
    layers: int
    units: tuple[Unit, ...]
    file_bytes: int
    budget: Budget
    runtime: str
    form: str
    shard_bytes: int
    memory: MemoryFacts
    disk: DiskFacts
    time: TimeFacts
    dense: tuple[Notice, ...] = ()
    view: PlanView | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the run."""
        return self.disk.need <= self.disk.free

    @property
    def plan(self) -> Plan | None:
        """The plan that would be carried out, before --refine and --check-uniform."""
        return self.view.planned[0].plan if self.view else None

    @property
    def size(self) -> SizeReport | None:
        """The bytes of the plan."""
        return self.view.planned[0].size if self.view else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; units by their names alone."""
        data: dict[str, Any] = {"schema": SCHEMA, **convert_to_plain(self)}
        del data["view"]
        data["units"] = [unit.name for unit in self.units]
        data["plan"], data["size"] = convert_to_plain(self.plan), convert_to_plain(self.size)
        data["front"] = convert_to_plain(self.view.front) if self.view else []
        data["disk"]["need"], data["disk"]["fits"] = self.disk.need, self.fits
        data["time"]["total"] = self.time.total
        roles = list_roles(self.units, self.plan.choices) if self.plan else []
        data["roles"] = {
            role: {"weights": weights, "layers": {c.label: n for c, n in sorted(counts.items())}}
            for role, weights, counts in roles
        }
        return data


def build_estimate_tables(found: Estimate) -> Sequence[Table | None]:
    """Build all tables of an estimate in order."""
    return (
        _build_run_table(found),
        _build_memory_table(found.memory),
        _build_disk_table(found),
        _build_time_table(found.time),
        _build_dense_table(found.dense),
        *_build_plan_tables(found),
    )


def _build_run_table(found: Estimate) -> Table:
    model = found.model
    files = f"files of at most {format_bytes(found.shard_bytes)}"
    return tabulate_pairs(
        "Dry run: nothing is measured, nothing is written",
        [
            ("model", f"{model.source}: {model.kind}, family {model.family}"),
            ("weights", f"{format_count(model.parameters)} ({model.parameters:,}), {model.dtype}"),
            ("layers", f"{found.layers:,} that can be compressed, in {model.blocks:,} blocks"),
            ("its files", format_bytes_exact(found.file_bytes)),
            ("target", f"{found.budget.asked} = {found.budget.limit_text}"),
            ("runtime", found.runtime),
            ("file format", f"{found.form}, {files}"),
        ],
    )


def _build_memory_table(memory: MemoryFacts) -> Table:
    how = "--max-memory" if memory.asked else "80% of what is free"
    whole = format_bytes(memory.whole)
    held = f"as a whole, {whole}" if memory.held_whole else f"one block at a time of {whole}"
    least = format_bytes(memory.least)
    return tabulate_pairs(
        "Memory",
        [
            ("limit", f"{format_bytes(memory.total)} ({how})"),
            ("for weights", f"{format_bytes(memory.weights)}; the model is held {held}"),
            ("for activations", f"{format_bytes(memory.activations)}, then they go to the disk"),
            ("least", f"about {least}" + _warn_of_least(memory)),
        ],
    )


def _warn_of_least(memory: MemoryFacts) -> str:
    return ": more than there is" if memory.least > memory.total else ""


def _build_disk_table(found: Estimate) -> Table:
    disk = found.disk
    missing = disk.need - disk.free
    fits = "enough" if found.fits else f"{missing:,} bytes too few: the run will be refused"
    return tabulate_pairs(
        f"Disk of {disk.place}, at most",
        [
            ("output", format_bytes_exact(disk.output)),
            ("finished steps", format_bytes_exact(disk.run)),
            ("activations", format_bytes_exact(disk.spilled)),
            ("together", format_bytes_exact(disk.need)),
            ("free", f"{format_bytes(disk.free)}, {fits}"),
        ],
    )


def _build_time_table(time: TimeFacts) -> Table:
    rows = [(stage, format_seconds(seconds)) for stage, seconds in time.stages.items()]
    probe = ", ".join(f"{what} {format_seconds(seconds)}" for what, seconds in time.probe.items())
    note = f"an estimate, scaled from: {probe}; counts {time.counted}; leaves out {time.left_out}"
    return Table(
        title="Time, estimated",
        columns=("stage", "time"),
        rows=(*rows, ("together, about", format_seconds(time.total))),
        right=("time",),
        note=note,
    )


def _build_dense_table(notices: Sequence[Notice]) -> Table:
    return Table(
        title="Stays in 16 bits, or not below 8",
        columns=("what", "why"),
        rows=tuple((notice.subject, notice.message) for notice in notices),
    )


def _build_plan_tables(found: Estimate) -> Sequence[Table]:
    if found.view is not None:
        return build_view_tables(found.view)
    message = "no plan yet: its scores are measured first (--sensitivity TABLE has them)"
    return [tabulate_pairs("Plan", [("plan", message)])]
