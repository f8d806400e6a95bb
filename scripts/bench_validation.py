#!/usr/bin/env python3
"""What `scripts/bench_validation` runs: `cptq analyze --validate` per model and seed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from _uses import find_use

SEEDS = 3


def run_analysis(model: Path, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the report of one seed, measured where it is not there yet."""
    place = given.out / f"{model.name}-{seed}"
    if not (place / "report.json").exists():
        if not model.is_dir():
            sys.exit(f"{model} is no directory; name one that holds a model")
        given.out.mkdir(parents=True, exist_ok=True)
        words: list[object] = ["analyze", model, "--validate", "--seed", seed, "-o", place]
        words += ["--calibration", given.calibration or find_use(str(model))[1]]
        for option in ("metric", "target", "allocator"):
            words += [
                word for value in getattr(given, option) or () for word in (f"--{option}", value)
            ]
        for option in ("pairs", "compressor", "samples"):
            value = getattr(given, option)
            words += [f"--{option}", value] if value else []
        line = [sys.executable, "-m", "cptq", *map(str, words)]
        print("$ cptq", *line[3:], file=sys.stderr, flush=True)
        done = subprocess.run(
            line, stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"}
        )
        if done.returncode:
            sys.exit("stopped: cptq analyze failed (above); what is measured is kept in --out")
    found: dict[str, Any] = json.loads((place / "report.json").read_text())
    return found


def spread(values: Sequence[float]) -> str:
    """`0.91 (0.88 to 0.94)`: mean, least and largest; one value alone."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def find_trial(report: dict[str, Any], target: str, plan: tuple[str | None, str]) -> dict[str, Any]:
    """Return the trial of one plan: (metric, allocator)."""
    trials = report["validation"]["trials"]
    return next(t for t in trials if (t["target"], t["metric"], t["allocator"]) == (target, *plan))


def show_ranks(reports: Sequence[dict[str, Any]]) -> None:
    """Print how the scores rank the measured pairs, best first."""
    rows = []
    for metric in [a["metric"] for a in reports[0]["validation"]["agreements"]]:
        found = [
            next((a for a in r["validation"]["agreements"] if a["metric"] == metric), None)
            for r in reports
        ]
        kept = [a for a in found if a is not None]
        ranks, orders = ([a[f"{k}_within"]["value"] for a in kept] for k in ("spearman", "kendall"))
        rows.append((sum(ranks) / len(ranks), metric, len(kept), spread(ranks), spread(orders)))
    print("| metric | seeds | Spearman | Kendall |\n|---|--:|--:|--:|")
    for _, metric, count, ranks_, orders_ in sorted(rows, reverse=True):
        print(f"| `{metric}` | {count} | {ranks_} | {orders_} |")
    print()


def show_plans(reports: Sequence[dict[str, Any]]) -> None:
    """Print the divergence of every plan as a multiple of that of `even`, best first."""
    trials = reports[0]["validation"]["trials"]
    targets = list(dict.fromkeys(t["target"] for t in trials))
    plans = list(dict.fromkeys((t["metric"], t["allocator"]) for t in trials if t["metric"]))
    rows = []
    for plan in plans:
        kept = [
            r
            for r in reports
            if any((t["metric"], t["allocator"]) == plan for t in r["validation"]["trials"])
        ]
        cells, logs = [], []
        for target in targets:
            ratios = [
                find_trial(r, target, plan)["divergence"]
                / find_trial(r, target, (None, "even"))["divergence"]
                for r in kept
            ]
            cells.append(spread(ratios))
            logs += [log(ratio) for ratio in ratios]
        rows.append((exp(sum(logs) / len(logs)), plan, len(kept), cells))
    print("| plan | seeds |", " | ".join(targets), "| geometric mean |")
    print("|---|--:|" + "--:|" * (len(targets) + 1))
    for mean, (metric, allocator), count, cells in sorted(rows):
        print(f"| `{metric}`, {allocator} | {count} |", " | ".join(cells), f"| {mean:.3f} |")
    blind = [[find_trial(r, t, (None, "even"))["divergence"] for r in reports] for t in targets]
    print("\nDivergence under `even` itself:", " / ".join(f"{sum(v) / len(v):.3g}" for v in blind))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_validation", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    for option in ("--metric", "--target", "--allocator"):
        parser.add_argument(option, action="append")
    for option in ("--pairs", "--compressor", "--calibration", "--samples"):
        parser.add_argument(option)
    parser.add_argument("--out", type=Path, default=Path("build/validation"))
    parser.add_argument("--from", dest="caller", type=Path, default=Path())
    given = parser.parse_args()
    for name in given.models:
        model = (given.caller / name).resolve()
        reports = [run_analysis(model, seed, given) for seed in range(given.seeds)]
        found = reports[0]["validation"]
        print(f"### {model.name}\n")
        print(
            f"{found['compressor']}, {len(found['pairs'])} pairs, {found['judge_tokens']:,} tokens "
            f"judge, {len(reports)} seeds: mean (least to largest).\n"
        )
        show_ranks(reports)
        show_plans(reports)


if __name__ == "__main__":
    main()
