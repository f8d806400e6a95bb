#!/usr/bin/env python3
"""Measure what each metric costs alone: `measure` with one metric, in a process of its own.

This is the place where the cost of a metric is measured (a table's `seconds` are those of its whole
run). Wall and processor seconds are those of `measure` alone, without loading the model and the
text; peak memory is that of the whole process, and the line `nothing` shows what loading takes. A
metric that only runs the model forward is measured again in another process, alternating with the
plain forward passes that it needs, so that both see the same machine: for trials the model from the
unit's block on, between the units; for a sampling pass all of its rows, medians of three each.
Their ratio uses processor seconds, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOTHING = "nothing"
TOGETHER = "all together"
#: how often a metric of a sampling pass and the pass itself take turns
TURNS = 3


@dataclass
class Spent:
    """Wall and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def add(self, work: Callable[[], Any]) -> Spent:
        """Run `work`, add its cost, and return the cost of this call."""
        began, began_cpu = time.perf_counter(), time.process_time()
        work()
        took = Spent(time.perf_counter() - began, time.process_time() - began_cpu)
        self.wall, self.cpu = self.wall + took.wall, self.cpu + took.cpu
        return took


@dataclass
class Plain:
    """Runs the plain forward passes of a metric between its units."""

    model: Any
    calibration: Any
    spent: Spent = field(default_factory=Spent)
    trials: dict[int | None, list[float]] = field(default_factory=dict)
    passes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from cptq.calibration.batches import choose_held_out_tokens, split_batches, split_held_out
        from cptq.calibration.replay import BlockReplay
        from cptq.calibration.samples import PASS_TOKENS, take_batches

        on_cpu = self.model.device.type == "cpu"
        tokens = choose_held_out_tokens(self.model.parameters, on_cpu)
        split = split_held_out(self.calibration.batches, self.model.kind, tokens)
        self.held_out = split.held_out
        self.pass_rows = split_batches(take_batches(split.fit, PASS_TOKENS))
        self.replay = BlockReplay(self.model, self.held_out)
        self.hidden = [self.replay.embed(index) for index in range(len(self.held_out))]

    def trial(self, block: int | None) -> None:
        """The held-out rows from a block on, as a trial runs them."""
        took = self.spent.add(lambda: self._from(block or 0))
        self.trials.setdefault(block, []).append(took.cpu)

    def _from(self, block: int) -> None:
        import torch

        with torch.no_grad():
            for index, hidden in enumerate(self.hidden):
                self.replay.run_from(block, hidden, index)

    def whole_pass(self) -> None:
        """The rows of a sampling pass."""
        import torch

        from cptq.calibration.replay import forward

        def run() -> None:
            with torch.no_grad():
                for rows in self.pass_rows:
                    forward(self.model, rows)

        self.passes.append(self.spent.add(run).cpu)


def child(
    model: str, metrics: list[str], calibration: dict[str, Any], beside: bool
) -> dict[str, Any]:
    """Load, measure and return the cost; `beside` plain forward passes, if the metric needs any."""
    from cptq.calibration.tokens import build_calibration
    from cptq.checkpoint.loader import load_model
    from cptq.config import DEFAULT_BITS, CalibrationSettings, ModelSettings
    from cptq.pipeline.candidates import list_candidates
    from cptq.sensitivity import METRICS
    from cptq.sensitivity.measure import measure
    from cptq.types import Progress

    settings = ModelSettings(model=model)
    loaded = load_model(settings, lambda event: None)
    text = build_calibration(
        loaded, CalibrationSettings(**calibration), settings, lambda event: None
    )
    if not metrics:
        return {"wall": 0.0, "cpu": 0.0, "peak": peak()}
    needs = METRICS.get(metrics[0]).needs if len(metrics) == 1 else None
    plain = None
    if beside and needs and forward_only(needs):
        plain = Plain(loaded, text)
        warm(plain, probe=needs.divergence)

    def listen(event: object) -> None:
        if not isinstance(event, Progress) or plain is None or not needs.divergence:
            return
        if event.stage == "sensitivity" and event.done < len(loaded.units):
            plain.trial(loaded.units[event.done].block)

    spent = Spent()
    tables: dict[str, Any] = {}

    def run() -> None:
        tables.update(
            measure(
                loaded, text, metrics=metrics, candidates=list_candidates(DEFAULT_BITS, 64), seed=0,
                emit=listen,
            )
        )  # fmt: skip

    if plain is not None and not needs.divergence:
        return turn_by_turn(plain, run)
    spent.add(run)
    found = {"wall": spent.wall, "cpu": spent.cpu, "peak": peak()}
    if plain is not None:
        found["wall"] -= plain.spent.wall
        found["cpu"] -= plain.spent.cpu
        found["needs"] = needed(plain, metrics[0], len(loaded.units), tables[metrics[0]])
    return found


def turn_by_turn(plain: Plain, run: Callable[[], None]) -> dict[str, Any]:
    """The metric and the plain pass it needs, in turn: a pass inside it would be sampled, too."""
    taken = []
    for _ in range(TURNS):
        plain.whole_pass()
        taken.append(Spent().add(run).cpu)
    return {"cpu": statistics.median(taken), "needs": statistics.median(plain.passes)}


def forward_only(needs: Any) -> bool:
    """Whether a metric runs the model forward and in no other way."""
    return not needs.path and bool(
        needs.divergence or (needs.samples and not needs.samples.gradients)
    )


def warm(plain: Plain, *, probe: bool) -> None:
    """One pass of each kind that does not count: the first one allocates."""
    if probe:
        plain.trial(0)
    else:
        plain.whole_pass()
    plain.spent, plain.trials, plain.passes = Spent(), {}, []


def needed(plain: Plain, metric: str, units: int, table: Any) -> float:
    """Processor seconds of the plain trials that a metric needs: medians, multiplied."""
    per_unit = trials_per_unit(metric, table)
    one_each = [statistics.median(taken) * len(taken) for taken in plain.trials.values()]
    first = statistics.median(plain.trials[0])
    whole = 1 + len(table.details.get("whole_model_curve", {}))  # the dense answers, and pruning's
    return per_unit * sum(one_each) + whole * first


def trials_per_unit(metric: str, table: Any) -> int:
    """Forward passes that a metric takes per unit."""
    if metric == "kl":
        return 1 + sum(not candidate.dense for candidate in next(iter(table.scores.values())))
    return len(table.details["sparsities"]) if metric == "pruning" else 1


def peak() -> int:
    """Most memory that this process has held, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def spawn(
    model: Path, metrics: list[str], calibration: dict[str, Any], *, beside: bool = False
) -> dict[str, Any]:
    """`child` in a process of its own."""
    job = json.dumps(
        {"model": str(model), "metrics": metrics, "calibration": calibration, "beside": beside}
    )
    line = [sys.executable, __file__, "--child", job]
    print("measuring", ", ".join(metrics) or NOTHING, file=sys.stderr, flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(model: Path, metric: str, calibration: dict[str, Any]) -> dict[str, Any]:
    """What one metric takes, and its ratio to plain forward passes if it has one."""
    from cptq.sensitivity import METRICS

    found = spawn(model, [metric], calibration)
    if forward_only(METRICS.get(metric).needs):
        beside = spawn(model, [metric], calibration, beside=True)
        found["ratio"] = beside["cpu"] / beside["needs"]
    return found


def show(model: Path, metrics: list[str], calibration: dict[str, Any], together: bool) -> None:
    """Measure, then print the table."""
    found = {NOTHING: spawn(model, [], calibration)}
    found |= {name: alone(model, name, calibration) for name in metrics}
    if together:
        found[TOGETHER] = spawn(model, metrics, calibration)
    total = sum(found[name]["cpu"] for name in metrics)
    print("| metric | seconds | processor seconds | of their sum | peak MB | to plain forwards |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, got in found.items():
        share = f"{got['cpu'] / total:.1%}" if total and name != NOTHING else ""
        ratio = f"{got['ratio']:.2f}" if "ratio" in got else ""
        print(
            f"| {name} | {got['wall']:.1f} | {got['cpu']:.1f} | {share} | {got['peak'] / 1e6:,.0f} "
            f"| {ratio} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_sensitivity", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--metric", action="append")
    parser.add_argument("--calibration", default="auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--alone-only", action="store_true")
    parser.add_argument("--from", dest="caller", type=Path, default=Path())
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        job = given.child
        print(json.dumps(child(**job)))
        return
    if given.model is None:
        parser.error("name a model")
    from cptq.sensitivity import METRICS, list_default_metrics

    metrics = [METRICS.check(name) for name in given.metric or list_default_metrics()]
    model = (given.caller / given.model).resolve()
    text = {"calibration": given.calibration, "samples": given.samples, "seqlen": given.seqlen}
    show(model, metrics, text, together=len(metrics) > 1 and not given.alone_only)


if __name__ == "__main__":
    main()
