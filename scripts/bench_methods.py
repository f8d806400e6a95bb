#!/usr/bin/env python3
"""What `scripts/bench_methods` runs: the cptq commands, each in a process of its own.

Each metric is measured once, by a `cptq analyze` of its own, for every target. A row's seconds are
processor time (user and system, all threads), as a busy neighbour does not change that much: those
of its `cptq compress` from start to end plus those of its metric's `cptq analyze`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = ("output", "cca", "pruning", "taylor")
TARGETS = ("4bit", "3bit")


@dataclass(frozen=True)
class Row:
    """One way to compress: its name, its options, the metric that it needs."""

    name: str
    target: str
    options: tuple[str, ...]
    metric: str | None = None


def rows(metrics: list[str], targets: list[str]) -> list[Row]:
    """Uniform ways first, then mixed ones, target by target."""
    found = []
    for target in targets:
        plain = ("--target", target, "--allocator", "uniform")
        found.append(Row("uniform, nearest", target, (*plain, "--compressor", "nearest")))
        found.append(Row("uniform, gptq", target, (*plain, "--compressor", "gptq")))
        found.append(Row("uniform, gptaq", target, plain))
        mixed = ("--target", target, "--no-check-uniform")
        found += [Row(f"mixed by {m}, gptaq", target, mixed, m) for m in metrics]
    return found


@dataclass(frozen=True)
class Bench:
    """Runs and remembers."""

    model: Path
    out: Path
    task: str
    limit: str | None
    calibration: tuple[str, ...]

    def cptq(self, *words: object) -> float:
        """Run one command; the seconds of processor time it took."""
        line = [sys.executable, "-m", "cptq", *map(str, words)]
        print("$ cptq", *line[3:], file=sys.stderr, flush=True)
        began = _spent()
        subprocess.run(line, stdout=subprocess.DEVNULL, check=True)
        return _spent() - began

    def evaluate(self, model: Path, name: str) -> float:
        """The task's first number."""
        file = self.out / f"{name}-eval.json"
        if not file.exists():
            limit = ("--limit", self.limit) if self.limit else ()
            self.cptq("eval", model, "--task", self.task, *limit, "-o", file)
        results: list[dict[str, Any]] = json.loads(file.read_text())["evaluation"]
        return float(results[0]["value"])

    def analyze(self, metric: str) -> tuple[Path, float]:
        """The file of a metric's table, and the seconds that it took."""
        place = self.out / f"analysis-{metric}"
        spent = self.out / f"analysis-{metric}-seconds.json"
        if not spent.exists():
            asked = ("--metric", metric, *self.calibration, "-o", place, "--overwrite")
            spent.write_text(json.dumps(self.cptq("analyze", self.model, *asked)))
        return place / "sensitivity" / f"{metric}.json", float(json.loads(spent.read_text()))

    def compress(self, row: Row) -> dict[str, Any]:
        """The row's numbers."""
        name = f"{row.target}-{row.name.replace(', ', '-').replace(' ', '-')}"
        place, seconds = self.out / name, self.out / f"{name}-seconds.json"
        if not seconds.exists():
            table, spent = self.analyze(row.metric) if row.metric else (None, 0.0)
            given = ("--sensitivity", table) if table else ()
            words = (*row.options, *given, *self.calibration, "-o", place, "--overwrite")
            seconds.write_text(json.dumps(spent + self.cptq("compress", self.model, *words)))
        report = json.loads((place / "report.json").read_text())
        return {
            "bytes": report["size"]["file_bytes"],
            "bits": report["size"]["nominal_bits"],
            "effective": report["size"]["effective_bits"],
            "value": self.evaluate(place, name),
            "seconds": json.loads(seconds.read_text()),
        }


def _spent() -> float:
    """Processor seconds of all commands run so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show(bench: Bench, metrics: list[str], targets: list[str]) -> None:
    """Run what is missing, then print the table."""
    dense = bench.evaluate(bench.model, "dense")
    size = sum(file.stat().st_size for file in bench.model.glob("*.safetensors"))
    lines = [(row, bench.compress(row)) for row in rows(metrics, targets)]
    print(f"| target | how | file bytes | of dense | bits | with scales | {bench.task} | "
          "to dense | CPU s |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    print(f"| | dense | {size:,} | 1.000 | 16 | 16 | {dense:.4g} | 1.000 | |")
    for row, got in lines:
        print(
            f"| {row.target} | {row.name} | {got['bytes']:,} | {got['bytes'] / size:.3f} | "
            f"{got['bits']:.3f} | {got['effective']:.3f} | {got['value']:.4g} | "
            f"{got['value'] / dense:.3f} | {got['seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_methods", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="wikitext")
    parser.add_argument("--limit")
    parser.add_argument("--calibration", default="auto")
    parser.add_argument("--samples")
    parser.add_argument("--metric", action="append")
    parser.add_argument("--target", action="append")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--from", dest="caller", type=Path, default=Path())
    given = parser.parse_args()
    model = (given.caller / given.model).resolve()
    out = given.out.resolve() / model.name
    out.mkdir(parents=True, exist_ok=True)
    samples = ("--samples", given.samples) if given.samples else ()
    calibration = ("--calibration", given.calibration, *samples)
    bench = Bench(model, out, given.task, given.limit, calibration)
    show(bench, given.metric or list(METRICS), given.target or list(TARGETS))


if __name__ == "__main__":
    main()
