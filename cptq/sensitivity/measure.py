"""Measure sensitivity: show every unit to every metric and collect the scores in tables.

    shared passes (cptq.sensitivity.prepare)
    for each block, as the pass of the samples gives it:
        for each unit: weights, for each candidate: dW = W - Q(W)    shared by all metrics

Samples and the grids of the rounding are dropped on the way. Whatever the order of blocks, tables
are in forward order. A table does not depend on which other metrics are measured with it, unless
memory forces fewer sampled rows.

What takes long is kept, so that a run that died need not do it again: the scores of each unit, the
gradients at each point of the path, the trials of the whole model. The passes of the samples and of
the held-out text run again; they cost as much as a few trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from cptq.types import (
    Candidate,
    Emit,
    Keep,
    Notice,
    Progress,
    SensitivityTable,
    Unit,
    keep_nothing,
)

#: what one metric found in a unit: its number, its scores, how many were negative, and its facts
_Found = tuple[float, dict[Candidate, float], int, Any]


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
    take_head_moment: Callable[[torch.Tensor], None] | None = None,
    keep: Keep = keep_nothing,
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
        take_head_moment: is given, before that, the second moment of what an output head reads,
            where a pass of the samples has come by it.
        keep: keeps what is finished.

    Returns:
        Metric name -> table, in the order of `metrics`.

    Raises:
        UnknownNameError: no such metric.
        UsageError: a candidate that cannot be scored.
        CalibrationError: too few tokens for a metric, or activations that are NaN or infinite.
        ModelError: nothing to compress, or weights that are NaN or infinite.
    """
    started = time.perf_counter()
    kinds = {name: METRICS.get(name) for name in dict.fromkeys(metrics)}
    candidates = tuple(dict.fromkeys(candidates))
    check_candidates(candidates)
    check_units(model)
    outer = bool(vocabulary)
    context = prepare_context(
        model, kinds, calibration, candidates, seed, emit, compress, outer=outer, keep=keep
    )
    scoring = _Scoring(
        context=context,
        runs={name: _Run(metric=kind(context)) for name, kind in kinds.items()},
        vocabulary=vocabulary or {},
        calibration_fingerprint=calibration.record.fingerprint if calibration else "",
        started=started,
    )
    scoring.score_units()
    head = context.samples.head_moment if context.samples is not None else None
    if head is not None and take_head_moment is not None:
        take_head_moment(head.mean_II)
    scoring.score_outer(compress_outer)
    scoring.finish_metrics()
    return scoring.build_tables()


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One metric and its scores so far."""

    metric: Metric
    per_unit: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    negative: int = 0

    def take(self, unit: str, found: _Found) -> None:
        """Take what was found in a unit, now or by a run that did not end."""
        self.per_unit[unit], self.scores[unit], negative, facts = found
        self.negative += negative
        if facts is not None:
            self.metric.facts[unit] = facts

    def sort_units(self, units: Sequence[str]) -> None:
        """Bring all units into this order."""
        self.per_unit = {name: self.per_unit[name] for name in units}
        self.scores = {name: self.scores[name] for name in units}
        facts = self.metric.facts
        self.metric.facts = {name: facts[name] for name in units if name in facts}


@dataclass(slots=True, kw_only=True, eq=False)
class _Scoring:
    """The loop over units."""

    context: Context
    runs: dict[str, _Run]
    vocabulary: Mapping[str, Sequence[Candidate]]
    calibration_fingerprint: str
    started: float

    def score_units(self) -> None:
        """Score all units, block by block."""
        context = self.context
        places = {unit.name: place for place, unit in enumerate(context.model.units)}
        total = len(places)
        for done, (unit, samples) in enumerate(_walk_units(context)):
            context.emit(Progress(stage="sensitivity", done=done, total=total, message=unit.name))
            step = f"unit-{places[unit.name]}"
            found = context.keep(step, partial(self._score_unit, unit, samples))
            for name, run in self.runs.items():
                run.take(unit.name, found[name])
            context.rounding.forget_unit(unit)
        context.emit(Progress(stage="sensitivity", done=total, total=total))
        for run in self.runs.values():
            run.sort_units(list(places))

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
        measured = context.divergence
        if measured is not None and compress is not None and not candidate.dense:
            divergence = context.keep(
                f"{unit.role}-{candidate.label}",
                lambda: measured.measure_unit(unit, compress(unit, candidate)),
            )
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

    def build_tables(self) -> dict[str, SensitivityTable]:
        """Return metric -> table."""
        return {name: self._build_table(name, run) for name, run in self.runs.items()}

    def _build_table(self, name: str, run: _Run) -> SensitivityTable:
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
            details={**details, **_describe_passes(metric)},
        )

    def _score_unit(self, unit: Unit, samples: Samples | None) -> dict[str, _Found]:
        """Return what each metric finds in a unit."""
        if _never_ran(unit, samples):
            return self._skip(unit)
        if samples is not None and not all(len(samples.layers[s.name].x_TI) for s in unit.layers):
            message = "no sampled token reaches it: metrics that sample tokens score it 0"
            self.context.emit(Notice(kind="warning", subject=unit.name, message=message))
        view = _build_view(unit, self.context, samples)
        numbers = {name: run.metric.measure_unit(view) for name, run in self.runs.items()}
        scores = {candidate: self._score(view, candidate) for candidate in self.context.candidates}
        return {
            name: (
                numbers[name],
                {candidate: max(row[name], 0.0) for candidate, row in scores.items()},
                sum(row[name] < 0 for row in scores.values()),
                run.metric.facts.get(unit.name),
            )
            for name, run in self.runs.items()
        }

    def _score(self, view: UnitView, candidate: Candidate) -> dict[str, float]:
        """Return each metric's score of a candidate, before negative ones are set to 0."""
        if not changes_weights(candidate):
            return dict.fromkeys(self.runs, 0.0)
        errors = self._round(view, candidate)
        return {
            name: run.metric.score_candidate(view, candidate, errors)
            for name, run in self.runs.items()
        }

    def _round(self, view: UnitView, candidate: Candidate) -> tuple[torch.Tensor, ...]:
        """W - Q(W) of the unit's layers; empty where no metric needs it."""
        if not any(run.metric.needs.rounding for run in self.runs.values()):
            return ()
        return self.context.rounding.compute_errors(view.unit, view.weights, candidate)

    def _skip(self, unit: Unit) -> dict[str, _Found]:
        message = "never runs on the calibration text, so its scores are 0"
        self.context.emit(Notice(kind="warning", subject=unit.name, message=message))
        return {
            name: (0.0, dict.fromkeys(self.context.candidates, 0.0), 0, None) for name in self.runs
        }


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
