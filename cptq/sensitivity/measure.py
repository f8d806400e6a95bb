"""The driver: one sampling pass, one held-out probe and one rounding per candidate for all metrics.

    calibration rows -> fit | held out
    fit      -> samples of every linear (inputs, gradients)      shared by cca, taylor, output
    held out -> probe                                            shared by pruning, kl
    for each unit: weights, for each candidate: dW = W - Q(W)    shared by all

A table does not depend on which other metrics are asked for at the same time, memory permitting.
`seconds` of a table are what its metric takes on its own: its own work plus the whole of each
shared step that it needs. Asked for together, metrics take less than their sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cptq.calibration.objective import Objective, objective_for
from cptq.calibration.probe import Probe
from cptq.calibration.samples import LayerSample, Samples, Wants, collect_samples
from cptq.calibration.slices import Split, held_out_tokens, split_held_out, token_count
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.errors import CalibrationError, ModelError
from cptq.sensitivity import METRICS
from cptq.sensitivity.metric import Context, Metric, UnitView
from cptq.sensitivity.rounding import check_candidates, rounding_error
from cptq.types import Candidate, Emit, Notice, Progress, SensitivityTable, Unit


def measure(
    model: LoadedModel,
    calibration: Calibration,
    *,
    metrics: Sequence[str],
    candidates: Sequence[Candidate],
    seed: int,
    emit: Emit,
) -> dict[str, SensitivityTable]:
    """Score every unit at every candidate by each metric.

    Args:
        model: the dense model; left as it was.
        calibration: text that flows through it; the end of it is held out for `pruning` and `kl`.
        metrics: names from `METRICS`; repeated ones count once.
        candidates: ways to store a unit; a dense one without sparsity scores 0.
        seed: of the sampled positions and directions.
        emit: takes progress and notices.

    Returns:
        Metric name -> table, in the order asked.

    Raises:
        UnknownNameError: no such metric.
        UsageError: a candidate that cannot be scored.
        CalibrationError: too few tokens for a metric, or activations that are NaN or infinite.
        ModelError: nothing to compress, or weights that are NaN or infinite.
    """
    kinds = {name: METRICS.get(name) for name in dict.fromkeys(metrics)}
    candidates = tuple(dict.fromkeys(candidates))
    check_candidates(candidates)
    _check_model(model)
    objective = objective_for(model.kind, model.config)
    held_out = held_out_tokens(model.parameters, model.device.type == "cpu")
    split = split_held_out(calibration.batches, model.kind, held_out)
    _check_tokens(kinds, model, token_count(split.fit))
    total = calibration.record.tokens
    context = _prepare(model, kinds, objective, split, candidates, total, seed, emit)
    runs = {name: _Run(metric=kind(context)) for name, kind in kinds.items()}
    clock = _score_units(context, runs)
    tables = {
        name: _table(name, run, context, calibration, clock.rounding) for name, run in runs.items()
    }
    _report_time(tables, context, clock, emit)
    return tables


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One metric under way."""

    metric: Metric
    per_unit: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    negative: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


@dataclass(slots=True, kw_only=True)
class _Clock:
    """Seconds of shared work."""

    rounding: float = 0.0


def _check_model(model: LoadedModel) -> None:
    if not model.units:
        raise ModelError(f"{model.source} has no layer that can be compressed")
    for unit in model.units:
        for layer in unit.layers:
            if not bool(torch.isfinite(get_weight(model.linear(layer.name))).all()):
                raise ModelError(
                    f"{layer.weight_name} holds NaN or infinity",
                    hint="the checkpoint is damaged: download or save it again",
                )


def _check_tokens(kinds: dict[str, type[Metric]], model: LoadedModel, tokens: int) -> None:
    for name, kind in kinds.items():
        least = kind.least_tokens(model)
        if tokens < least:
            raise CalibrationError(
                f"metric {name!r} needs at least {least} calibration tokens, there are {tokens}",
                hint="pass larger --samples or --seqlen, or a longer text",
            )


def _prepare(
    model: LoadedModel,
    kinds: dict[str, type[Metric]],
    objective: Objective,
    split: Split,
    candidates: tuple[Candidate, ...],
    calibration_tokens: int,
    seed: int,
    emit: Emit,
) -> Context:
    """The shared passes."""
    samples = probe = None
    wanted = [kind.needs.samples for kind in kinds.values() if kind.needs.samples is not None]
    if wanted:
        wants = Wants()
        for want in wanted:
            wants = wants | want
        least = max(kind.least_tokens(model) for kind in kinds.values())
        samples = collect_samples(
            model, split.fit, objective, wants, seed=seed, emit=emit, least=least
        )
    if any(kind.needs.probe for kind in kinds.values()):
        probe = Probe(model, split.held_out, objective)
    if samples and probe and split.overlap:
        message = "too little text to keep the held-out rows out of the sampled ones"
        emit(Notice(kind="info", subject="sensitivity samples", message=message))
    return Context(
        model=model,
        objective=objective,
        samples=samples,
        probe=probe,
        candidates=candidates,
        calibration_tokens=calibration_tokens,
        seed=seed,
        emit=emit,
    )


def _score_units(context: Context, runs: dict[str, _Run]) -> _Clock:
    clock = _Clock()
    units = context.model.units
    for index, unit in enumerate(units):
        context.emit(Progress(stage="sensitivity", done=index, total=len(units), message=unit.name))
        if _never_ran(unit, context.samples):
            _skip(unit, context, runs)
            continue
        _score_unit(_view(unit, context), context, runs, clock)
    context.emit(Progress(stage="sensitivity", done=len(units), total=len(units)))
    return clock


def _score_unit(view: UnitView, context: Context, runs: dict[str, _Run], clock: _Clock) -> None:
    name = view.unit.name
    for run in runs.values():
        with run.timed():
            run.per_unit[name] = run.metric.unit(view)
        run.scores[name] = {}
    for candidate in context.candidates:
        if candidate.dense and not candidate.sparsity:
            for run in runs.values():
                run.scores[name][candidate] = 0.0
            continue
        started = time.perf_counter()
        layers = zip(view.weights, view.unit.layers, strict=True)
        errors = tuple(rounding_error(W_OI, spec, candidate) for W_OI, spec in layers)
        clock.rounding += time.perf_counter() - started
        for run in runs.values():
            with run.timed():
                score = run.metric.candidate(view, candidate, errors)
            run.negative += score < 0
            run.scores[name][candidate] = max(score, 0.0)


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


def _skip(unit: Unit, context: Context, runs: dict[str, _Run]) -> None:
    message = "never runs on the calibration text: its scores are 0, whatever it may be worth"
    context.emit(Notice(kind="warning", subject=unit.name, message=message))
    for run in runs.values():
        run.per_unit[unit.name] = 0.0
        run.scores[unit.name] = dict.fromkeys(context.candidates, 0.0)


def _table(
    name: str, run: _Run, context: Context, calibration: Calibration, rounding: float
) -> SensitivityTable:
    needs = run.metric.needs
    samples = context.samples if needs.samples is not None else None
    probe = context.probe if needs.probe else None
    with run.timed():
        per_block = run.metric.per_block(run.per_unit)
    if run.negative:
        message = f"{run.negative} scores below 0 (noise) were set to 0"
        context.emit(Notice(kind="info", subject=f"metric {name}", message=message))
    details = run.metric.details() | {"negative_scores": run.negative}
    if samples is not None:
        rows = max(len(sample.x_TI) for sample in samples.layers.values())
        details |= {"sampled_rows": rows, "pass_tokens": samples.tokens}
    if probe is not None:
        details |= {"held_out_tokens": probe.tokens}
    return SensitivityTable(
        metric=name,
        score_unit=run.metric.score_unit,
        scores=run.scores,
        per_unit=run.per_unit,
        per_block=per_block,
        model_fingerprint=context.model.fingerprint,
        calibration_fingerprint=calibration.record.fingerprint,
        seed=context.seed,
        tokens=samples.tokens if samples is not None else probe.tokens if probe else 0,
        seconds=run.seconds
        + rounding
        + (samples.seconds if samples else 0.0)
        + (probe.seconds if probe else 0.0),
        details=details,
    )


def _report_time(
    tables: dict[str, SensitivityTable], context: Context, clock: _Clock, emit: Emit
) -> None:
    """Where the time went, as one notice."""
    shared = {
        "samples": context.samples.seconds if context.samples else 0.0,
        "probe": context.probe.seconds if context.probe else 0.0,
        "rounding": clock.rounding,
    }
    parts = [f"{name} {seconds:.1f}" for name, seconds in shared.items() if seconds]
    alone = [f"{name} {table.seconds:.1f}" for name, table in tables.items()]
    message = f"shared steps: {', '.join(parts)}; each metric alone: {', '.join(alone)}"
    emit(Notice(kind="info", subject="seconds of sensitivity", message=message))
