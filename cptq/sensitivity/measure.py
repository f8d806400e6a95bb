"""Measure sensitivity: show every unit to every metric and collect the scores in tables.

    shared passes (cptq.sensitivity.prepare)
    for each block, as the pass of the samples gives it:
        for each unit: weights, for each candidate: dW = W - Q(W)    shared by all metrics

Samples and the grids of the rounding are dropped on the way. Whatever the order of blocks, tables
are in forward order. A table does not depend on which other metrics are measured with it, unless
memory forces fewer sampled rows. After an interrupt (Ctrl-C) the units that all metrics have scored
are kept, in partial tables: their details hold `partial`, their files are called
`METRIC.partial.json`, and no plan is made from them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cptq.calibration.recorder import LayerSample
from cptq.calibration.samples import Samples
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.sensitivity import METRICS
from cptq.sensitivity.metric import Compress, Context, Metric, UnitView
from cptq.sensitivity.prepare import check_units, prepare_context
from cptq.sensitivity.rounding import changes_weights, check_candidates
from cptq.types import Candidate, Emit, Notice, Progress, SensitivityTable, Unit

#: key in the details of a table that lacks units
PARTIAL = "partial"


class InterruptedMeasurementError(KeyboardInterrupt):
    """Ctrl-C while units were being scored.

    Attributes:
        tables: metric -> partial table of the units that every metric has scored.
        done, total: how many units those are, and how many there are.
    """

    def __init__(self, tables: Mapping[str, SensitivityTable], done: int, total: int) -> None:
        super().__init__()
        self.tables = tables
        self.done = done
        self.total = total


def needs_text(metrics: Sequence[str]) -> bool:
    """Return whether any of these metrics needs calibration text."""
    return any(METRICS.get(name).needs.text for name in metrics)


def measure(
    model: LoadedModel,
    calibration: Calibration | None,
    *,
    metrics: Sequence[str],
    candidates: Sequence[Candidate],
    seed: int,
    emit: Emit,
    compress: Compress | None = None,
    vocabulary: Mapping[str, Sequence[Candidate]] | None = None,
    compress_outer: Compress | None = None,
) -> dict[str, SensitivityTable]:
    """Score every unit at every candidate by each metric.

    Units outside the blocks, the token embedding and the output head, get the divergence measured
    with that unit alone compressed: there are one or two, and no estimate is as good. `cca` counts
    them as average units, and metrics of the weights alone score them as every unit.

    Args:
        model: the dense model; left unchanged.
        calibration: text for the forward passes; its end is held out for `pruning`, `kl` and
            the other metrics that measure a divergence. None if no metric `needs_text`.
        metrics: names from `METRICS`; repeated ones count once.
        candidates: ways to store a unit; a dense one without sparsity scores 0.
        seed: seed of the sampled positions, directions and noise.
        emit: takes progress and notices.
        compress: gives the weights of a unit stored as a candidate, for `kl`; rounding to nearest
            without.
        vocabulary: {unit outside the blocks: ways to store it}; the others are not scored.
        compress_outer: gives the weights of such a unit stored as a candidate; needed where a
            metric reads text.

    Returns:
        Metric name -> table, in the order of `metrics`.

    Raises:
        UnknownNameError: no such metric.
        UsageError: a candidate that cannot be scored.
        CalibrationError: too few tokens for a metric, or activations that are NaN or infinite.
        ModelError: nothing to compress, or weights that are NaN or infinite.
        InterruptedMeasurementError: Ctrl-C after the first unit was scored; it holds the tables.
    """
    started = time.perf_counter()
    kinds = {name: METRICS.get(name) for name in dict.fromkeys(metrics)}
    candidates = tuple(dict.fromkeys(candidates))
    check_candidates(candidates)
    check_units(model)
    context = prepare_context(
        model, kinds, calibration, candidates, seed, emit, compress, outer=bool(vocabulary)
    )
    scoring = _Scoring(
        context=context,
        runs={name: _Run(metric=kind(context)) for name, kind in kinds.items()},
        vocabulary=vocabulary or {},
        calibration_fingerprint=calibration.record.fingerprint if calibration else "",
        started=started,
    )
    try:
        scoring.score_units()
        scoring.score_outer(compress_outer)
        scoring.finish_metrics()
    except KeyboardInterrupt as stop:
        if not scoring.done:
            raise
        raise scoring.interrupt() from stop
    return scoring.build_tables()


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One metric and its scores so far."""

    metric: Metric
    per_unit: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    negative: int = 0

    def keep_units(self, units: Sequence[str]) -> None:
        """Drop the scores of all units but these, and bring these into this order."""
        self.per_unit = {name: self.per_unit[name] for name in units}
        self.scores = {name: self.scores[name] for name in units}


@dataclass(slots=True, kw_only=True, eq=False)
class _Scoring:
    """The loop over units; `done` names those that every metric has scored."""

    context: Context
    runs: dict[str, _Run]
    vocabulary: Mapping[str, Sequence[Candidate]]
    calibration_fingerprint: str
    started: float
    done: list[str] = field(default_factory=list)

    def score_units(self) -> None:
        """Score all units, block by block."""
        context = self.context
        total = len(context.model.units)
        for unit, samples in _walk_units(context):
            done = len(self.done)
            context.emit(Progress(stage="sensitivity", done=done, total=total, message=unit.name))
            if _never_ran(unit, samples):
                self._skip(unit)
            else:
                self._score(_build_view(unit, context, samples))
            context.rounding.forget_unit(unit)
            self.done.append(unit.name)
        context.emit(Progress(stage="sensitivity", done=total, total=total))
        self._keep_done()

    def _keep_done(self) -> None:
        """Keep the scores of the units that are done, in forward order."""
        scored = set(self.done)
        done = [unit.name for unit in self.context.model.units if unit.name in scored]
        for run in self.runs.values():
            run.keep_units(done)

    def score_outer(self, compress: Compress | None) -> None:
        """Score the units outside the blocks."""
        context = self.context
        known = {unit.name: unit for unit in context.model.vocabulary}
        trials = [(known[name], c) for name, row in self.vocabulary.items() for c in row]
        for done, (unit, candidate) in enumerate(trials):
            message = f"{unit.name} at {candidate.label}"
            context.emit(
                Progress(stage="vocabulary", done=done, total=len(trials), message=message)
            )
            self._score_outer(unit, candidate, compress)
        if trials:
            context.emit(Progress(stage="vocabulary", done=len(trials), total=len(trials)))

    def _score_outer(self, unit: Unit, candidate: Candidate, compress: Compress | None) -> None:
        context = self.context
        view = UnitView(unit=unit, weights=_read_weights(unit, context))
        divergence = None
        if context.divergence is not None and compress is not None and not candidate.dense:
            divergence = context.divergence.measure_unit(unit, compress(unit, candidate))
        for run in self.runs.values():
            row = run.scores.setdefault(unit.name, {})
            if candidate.dense:
                row[candidate] = 0.0
            elif run.metric.needs.text:
                assert divergence is not None
                row[candidate] = run.metric.score_outer(view, candidate, divergence, run.per_unit)
            else:
                run.metric.measure_unit(view)
                row[candidate] = run.metric.score_candidate(
                    view, candidate, self._round(view, candidate)
                )

    def finish_metrics(self) -> None:
        """Let each metric measure what concerns the model as a whole."""
        for run in self.runs.values():
            run.metric.measure_model()

    def interrupt(self) -> InterruptedMeasurementError:
        """Return the error that holds the tables of the units that are done."""
        self._keep_done()
        done, total = len(self.done), len(self.context.model.units) + len(self.vocabulary)
        tables = self.build_tables({PARTIAL: {"units": done, "of": total}})
        return InterruptedMeasurementError(tables, done, total)

    def build_tables(self, extra: Mapping[str, Any] | None = None) -> dict[str, SensitivityTable]:
        """Return metric -> table; `extra` goes into the details."""
        return {name: self._build_table(name, run, extra or {}) for name, run in self.runs.items()}

    def _build_table(self, name: str, run: _Run, extra: Mapping[str, Any]) -> SensitivityTable:
        metric, context = run.metric, self.context
        per_block = metric.aggregate_blocks(run.per_unit)
        if run.negative:
            message = f"{run.negative} scores below 0 (noise) were set to 0"
            context.emit(Notice(kind="info", subject=f"metric {name}", message=message))
        details = metric.collect_details() | {"negative_scores": run.negative}
        return SensitivityTable(
            metric=name,
            score_unit=metric.score_unit,
            scores=run.scores,
            per_unit=run.per_unit,
            per_block=per_block,
            model_fingerprint=context.model.fingerprint,
            calibration_fingerprint=self.calibration_fingerprint if metric.needs.text else "",
            seed=context.seed,
            tokens=_count_tokens(metric),
            seconds=time.perf_counter() - self.started,
            details={**details, **_describe_passes(metric), **extra},
        )

    def _score(self, view: UnitView) -> None:
        name = view.unit.name
        for run in self.runs.values():
            run.per_unit[name] = run.metric.measure_unit(view)
            run.scores[name] = {}
        for candidate in self.context.candidates:
            if changes_weights(candidate):
                self._score_candidate(view, candidate)
            else:
                for run in self.runs.values():
                    run.scores[name][candidate] = 0.0

    def _score_candidate(self, view: UnitView, candidate: Candidate) -> None:
        errors = self._round(view, candidate)
        for run in self.runs.values():
            score = run.metric.score_candidate(view, candidate, errors)
            run.negative += score < 0
            run.scores[view.unit.name][candidate] = max(score, 0.0)

    def _round(self, view: UnitView, candidate: Candidate) -> tuple[torch.Tensor, ...]:
        """W - Q(W) of the unit's layers; empty where no metric needs it."""
        if not any(run.metric.needs.rounding for run in self.runs.values()):
            return ()
        return self.context.rounding.compute_errors(view.unit, view.weights, candidate)

    def _skip(self, unit: Unit) -> None:
        message = "never runs on the calibration text, so its scores are 0"
        self.context.emit(Notice(kind="warning", subject=unit.name, message=message))
        for run in self.runs.values():
            run.per_unit[unit.name] = 0.0
            run.scores[unit.name] = dict.fromkeys(self.context.candidates, 0.0)


def _walk_units(context: Context) -> Iterator[tuple[Unit, Samples | None]]:
    """Yield every unit with the samples of its block, if any metric needs some."""
    if context.samples is None:
        yield from ((unit, None) for unit in context.model.units)
        return
    for samples in context.samples:
        yield from ((unit, samples) for unit in samples.units)


def _build_view(unit: Unit, context: Context, samples: Samples | None) -> UnitView:
    """Return the weights and samples of a unit on the model's device; shared inputs stay shared."""
    device = context.model.device
    weights = _read_weights(unit, context)
    if samples is None:
        return UnitView(unit=unit, weights=weights)
    inputs: dict[int, torch.Tensor] = {}
    moved = []
    for spec in unit.layers:
        sample = samples.layers[spec.name]
        x_TI = inputs.setdefault(id(sample.x_TI), sample.x_TI.to(device))
        moved.append(
            LayerSample(
                x_TI=x_TI,
                g_TO=None if sample.g_TO is None else sample.g_TO.to(device),
                moment=sample.moment,
                scale=sample.scale,
            )
        )
    few = tuple(samples.activations[s.name] for s in unit.layers if samples.activations)
    return UnitView(unit=unit, weights=weights, samples=tuple(moved), activations=few)


def _read_weights(unit: Unit, context: Context) -> tuple[torch.Tensor, ...]:
    return tuple(get_weight(context.model.linear(s.name)).float() for s in unit.layers)


def _never_ran(unit: Unit, samples: Samples | None) -> bool:
    return samples is not None and any(s.name not in samples.layers for s in unit.layers)


def _count_tokens(metric: Metric) -> int:
    """Return the tokens that a metric was measured on; 0 for one of the weights alone."""
    needs, context = metric.needs, metric.context
    if needs.samples is not None and context.samples is not None:
        return context.samples.tokens
    if needs.path and context.path is not None:
        return context.path.tokens
    return context.divergence.tokens if needs.divergence and context.divergence is not None else 0


def _describe_passes(metric: Metric) -> dict[str, Any]:
    """Return the sizes of the shared passes that a metric reads, for the details of its table."""
    needs, context = metric.needs, metric.context
    details: dict[str, Any] = {}
    if needs.samples is not None and context.samples is not None:
        sampled, few = context.samples.sampled_rows, context.samples.activation_rows
        rows = sampled if needs.samples.gradients else few
        details |= {"sampled_rows": rows, "pass_tokens": context.samples.tokens}
    if needs.path and context.path is not None:
        details |= {"gradient_tokens": context.path.tokens}
    if needs.divergence and context.divergence is not None:
        details |= {"held_out_tokens": context.divergence.tokens}
    return details
