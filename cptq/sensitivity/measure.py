"""The driver: every unit's weights, samples and rounding errors made once and shown to all metrics.

    shared passes (cptq.sensitivity.prepare)
    for each unit: weights, for each candidate: dW = W - Q(W)    shared by all

A table does not depend on which other metrics are asked for at the same time, memory permitting.
An interrupt (Ctrl-C) loses nothing that is whole: the units that all metrics have scored come along
with it as partial tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cptq.calibration.samples import LayerSample, Samples
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.sensitivity import METRICS
from cptq.sensitivity.metric import Context, UnitView
from cptq.sensitivity.partial import InterruptedMeasurementError, marks
from cptq.sensitivity.prepare import check_model, prepare
from cptq.sensitivity.rounding import changes, check_candidates
from cptq.sensitivity.table import Run, report_time, table
from cptq.types import Candidate, Emit, Notice, Progress, SensitivityTable, Unit


def needs_text(metrics: Sequence[str]) -> bool:
    """Whether any of these metrics looks at more than the weights."""
    return any(METRICS.get(name).needs.text for name in metrics)


def measure(
    model: LoadedModel,
    calibration: Calibration | None,
    *,
    metrics: Sequence[str],
    candidates: Sequence[Candidate],
    seed: int,
    emit: Emit,
) -> dict[str, SensitivityTable]:
    """Score every unit at every candidate by each metric.

    Args:
        model: the dense model; left as it was.
        calibration: text that flows through it; the end of it is held out for `pruning`, `kl` and
            their like. None will do where no metric `needs_text`.
        metrics: names from `METRICS`; repeated ones count once.
        candidates: ways to store a unit; a dense one without sparsity scores 0.
        seed: of the sampled positions, directions and noise.
        emit: takes progress and notices.

    Returns:
        Metric name -> table, in the order asked.

    Raises:
        UnknownNameError: no such metric.
        UsageError: a candidate that cannot be scored.
        CalibrationError: too few tokens for a metric, or activations that are NaN or infinite.
        ModelError: nothing to compress, or weights that are NaN or infinite.
        InterruptedMeasurementError: Ctrl-C came when units had been scored; it holds their tables.
    """
    kinds = {name: METRICS.get(name) for name in dict.fromkeys(metrics)}
    candidates = tuple(dict.fromkeys(candidates))
    check_candidates(candidates)
    check_model(model)
    context = prepare(model, kinds, calibration, candidates, seed, emit)
    fingerprint = calibration.record.fingerprint if calibration else ""
    runs = {name: Run(metric=kind(context)) for name, kind in kinds.items()}
    scoring = _Scoring(context=context, runs=runs, calibration_fingerprint=fingerprint)
    try:
        scoring.units()
        scoring.finish()
    except KeyboardInterrupt as stop:
        if not scoring.done:
            raise
        raise scoring.interrupted() from stop
    tables = scoring.tables({})
    report_time(tables, context, scoring.rounding, emit)
    return tables


@dataclass(slots=True, kw_only=True, eq=False)
class _Scoring:
    """The loop over units; `done` names those that every metric has scored."""

    context: Context
    runs: dict[str, Run]
    calibration_fingerprint: str
    done: list[str] = field(default_factory=list)
    encoding: float = 0.0

    @property
    def rounding(self) -> float:
        """Seconds of the rounding that metrics share."""
        return self.encoding + self.context.rounding.fitting

    def units(self) -> None:
        """Score all units in forward order."""
        context = self.context
        units = context.model.units
        for index, unit in enumerate(units):
            context.emit(
                Progress(stage="sensitivity", done=index, total=len(units), message=unit.name)
            )
            if _never_ran(unit, context.samples):
                self._skip(unit)
            else:
                self._score(_view(unit, context))
            self.done.append(unit.name)
        context.emit(Progress(stage="sensitivity", done=len(units), total=len(units)))

    def finish(self) -> None:
        """What metrics measure of the model as a whole."""
        for run in self.runs.values():
            with run.timed(self.context.memo):
                run.metric.finish()

    def tables(self, extra: dict[str, dict[str, int]]) -> dict[str, SensitivityTable]:
        """Metric -> table; `extra` goes into the details."""
        return {
            name: table(name, run, self.context, self.calibration_fingerprint, self.rounding, extra)
            for name, run in self.runs.items()
        }

    def interrupted(self) -> InterruptedMeasurementError:
        """The tables of the units that are done."""
        for run in self.runs.values():
            run.forget(self.done)
        done, total = len(self.done), len(self.context.model.units)
        return InterruptedMeasurementError(self.tables(marks(done, total)), done, total)

    def _score(self, view: UnitView) -> None:
        name = view.unit.name
        for run in self.runs.values():
            with run.timed(view.memo):
                run.per_unit[name] = run.metric.unit(view)
            run.scores[name] = {}
        for candidate in self.context.candidates:
            if changes(candidate):
                self._score_candidate(view, candidate)
            else:
                for run in self.runs.values():
                    run.scores[name][candidate] = 0.0

    def _errors(self, view: UnitView, candidate: Candidate) -> tuple[torch.Tensor, ...]:
        if not any(run.metric.needs.rounding for run in self.runs.values()):
            return ()
        rounding = self.context.rounding
        started, fitting = time.perf_counter(), rounding.fitting
        errors = rounding.errors(view.unit, view.weights, candidate)
        self.encoding += time.perf_counter() - started - (rounding.fitting - fitting)
        return errors

    def _score_candidate(self, view: UnitView, candidate: Candidate) -> None:
        errors = self._errors(view, candidate)
        for run in self.runs.values():
            with run.timed(view.memo):
                score = run.metric.candidate(view, candidate, errors)
            run.negative += score < 0
            run.scores[view.unit.name][candidate] = max(score, 0.0)

    def _skip(self, unit: Unit) -> None:
        message = "never runs on the calibration text: its scores are 0, whatever it may be worth"
        self.context.emit(Notice(kind="warning", subject=unit.name, message=message))
        for run in self.runs.values():
            run.per_unit[unit.name] = 0.0
            run.scores[unit.name] = dict.fromkeys(self.context.candidates, 0.0)


def _view(unit: Unit, context: Context) -> UnitView:
    """Weights and samples of a unit on the model's device; shared inputs stay shared."""
    device = context.model.device
    weights = tuple(get_weight(context.model.linear(s.name)).float() for s in unit.layers)
    if context.samples is None:
        return UnitView(unit=unit, weights=weights)
    inputs: dict[int, torch.Tensor] = {}
    moved = []
    for spec in unit.layers:
        sample = context.samples.layers[spec.name]
        x_TI = inputs.setdefault(id(sample.x_TI), sample.x_TI.to(device))
        moved.append(
            LayerSample(
                x_TI=x_TI,
                g_TO=None if sample.g_TO is None else sample.g_TO.to(device),
                label_g_TO=None if sample.label_g_TO is None else sample.label_g_TO.to(device),
                moment=sample.moment,
                scale=sample.scale,
            )
        )
    return UnitView(unit=unit, weights=weights, samples=tuple(moved))


def _never_ran(unit: Unit, samples: Samples | None) -> bool:
    return samples is not None and any(s.name not in samples.layers for s in unit.layers)
