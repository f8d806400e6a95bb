"""From a metric's run to its table, and what is said of the time.

`seconds` of a table are what its metric takes on its own: its own work plus the whole of each
shared step that it needs. Asked for together, metrics take less than their sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cptq.sensitivity.memo import Memo
from cptq.sensitivity.metric import Context, Metric
from cptq.types import Candidate, Emit, Notice, SensitivityTable


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """One metric under way."""

    metric: Metric
    per_unit: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    negative: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self, memo: Memo) -> Iterator[None]:
        """Charge what happens inside, and what was found made in `memo`, to this metric."""
        started, borrowed = time.perf_counter(), memo.borrowed
        yield
        self.seconds += time.perf_counter() - started + memo.borrowed - borrowed

    def forget(self, units: Sequence[str]) -> None:
        """Drop every unit that is not among `units`."""
        self.per_unit = {name: self.per_unit[name] for name in units}
        self.scores = {name: self.scores[name] for name in units}


def table(
    name: str,
    run: Run,
    context: Context,
    calibration_fingerprint: str,
    rounding: float,
    marks: Mapping[str, Any],
) -> SensitivityTable:
    """The table of one metric; `rounding` is the seconds of it, `marks` go into the details."""
    needs = run.metric.needs
    with run.timed(context.memo):
        per_block = run.metric.per_block(run.per_unit)
    if run.negative:
        message = f"{run.negative} scores below 0 (noise) were set to 0"
        context.emit(Notice(kind="info", subject=f"metric {name}", message=message))
    details = run.metric.details() | {"negative_scores": run.negative}
    return SensitivityTable(
        metric=name,
        score_unit=run.metric.score_unit,
        scores=run.scores,
        per_unit=run.per_unit,
        per_block=per_block,
        model_fingerprint=context.model.fingerprint,
        calibration_fingerprint=calibration_fingerprint if needs.text else "",
        seed=context.seed,
        tokens=_tokens(run.metric),
        seconds=run.seconds + _shared_seconds(run.metric, rounding),
        details={**details, **_pass_details(run.metric), **marks},
    )


def _tokens(metric: Metric) -> int:
    """Tokens that the metric was measured on; 0 for one of the weights alone."""
    needs, context = metric.needs, metric.context
    if needs.samples is not None and context.samples is not None:
        return context.samples.tokens
    if needs.path and context.path is not None:
        return context.path.tokens
    return context.probe.tokens if needs.probe and context.probe is not None else 0


def _pass_details(metric: Metric) -> dict[str, Any]:
    needs, context = metric.needs, metric.context
    details: dict[str, Any] = {}
    if needs.samples is not None and context.samples is not None:
        kept = context.samples.layers if needs.samples.backward else context.samples.views
        rows = max((len(sample.x_TI) for sample in kept.values()), default=0)
        details |= {"sampled_rows": rows, "pass_tokens": context.samples.tokens}
    if needs.path and context.path is not None:
        details |= {"gradient_tokens": context.path.tokens}
    if needs.probe and context.probe is not None:
        details |= {"held_out_tokens": context.probe.tokens}
    return details


def _shared_seconds(metric: Metric, rounding: float) -> float:
    needs, context = metric.needs, metric.context
    seconds = rounding if needs.rounding or needs.path else 0.0
    if needs.samples is not None and context.samples is not None:
        seconds += context.samples.seconds
    if needs.probe and context.probe is not None:
        seconds += context.probe.seconds
    if needs.path and context.path is not None:
        seconds += context.path.setup + sum(context.path.seconds[place] for place in needs.path)
    return seconds


def report_time(
    tables: Mapping[str, SensitivityTable], context: Context, rounding: float, emit: Emit
) -> None:
    """Where the time went, as one notice."""
    path = context.path
    shared = {
        "samples": context.samples.seconds if context.samples else 0.0,
        "probe": context.probe.seconds if context.probe else 0.0,
        "gradients": path.setup + sum(path.seconds.values()) if path else 0.0,
        "rounding": rounding,
    }
    parts = [f"{name} {seconds:.1f}" for name, seconds in shared.items() if seconds]
    alone = [f"{name} {table.seconds:.1f}" for name, table in tables.items()]
    message = f"shared steps: {', '.join(parts)}; each metric alone: {', '.join(alone)}"
    emit(Notice(kind="info", subject="seconds of sensitivity", message=message))
