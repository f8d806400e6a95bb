#!/usr/bin/env python3
"""What `scripts/bench_ingredients` runs: `cptq compress` with parts of the default switched off.

Every row has the same target, so the same bytes. Cost is that of `cptq compress`, with measuring.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from _runs import Cost, count_weight_bytes, read_metric, run

#: part of the default -> the options without it
OFF = {
    "asymmetric target": ("--compressor", "gptq"),
    "narrow scales": ("--scales", "16bit"),
    "vocabulary in the plan": ("--embedding-bits", "16"),
}


def rows(tune: bool) -> dict[str, tuple[str, ...]]:
    """Name -> options, the plainest first."""
    found = {"none": sum(OFF.values(), ())}
    for part in OFF:
        others = (words for name, words in OFF.items() if name != part)
        found[f"{part} alone"] = sum(others, ())
    found["default"] = ()
    found |= {f"default without {part}": words for part, words in OFF.items()}
    if tune:
        found["default and --tune"] = ("--tune",)
    return found


@dataclass(frozen=True)
class Bench:
    """Compresses and evaluates; remembers what it did in `out`."""

    model: Path
    out: Path
    common: tuple[str, ...]
    task: str
    limit: tuple[str, ...]

    def measure(self, name: str, options: tuple[str, ...], seed: int) -> tuple[float, Cost, int]:
        """Return KL, cost and bytes of one row and seed."""
        place = self.out / f"{name.replace(' ', '-')}-{seed}"
        file = place.with_suffix(".json")
        if not file.exists():
            words = (*self.common, *options, "--seed", seed, "--no-check-uniform")
            cost = run("compress", self.model, *words, "-o", place, "--overwrite")
            against = ("--baseline", self.model, "--task", self.task, *self.limit)
            results = place.with_name(f"{place.name}-eval.json")
            run("eval", place, *against, "-o", results, "--overwrite")
            found = {"kl": read_metric(results, "kl"), "bytes": count_weight_bytes(place)}
            row = {**found, **vars(cost)}
            file.write_text(json.dumps(row))
        row = json.loads(file.read_text())
        return row["kl"], Cost(seconds=row["seconds"], memory=row["memory"]), row["bytes"]


def main() -> None:
    """Measure every row and print the table."""
    given = parse_arguments()
    out = (given.caller / given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    common = ["--target", given.target, "--runtime", given.runtime]
    common += ["--calibration", given.calibration] if given.calibration else []
    limit = ("--limit", given.limit) if given.limit else ()
    bench = Bench(
        model=(given.caller / given.model).resolve(),
        out=out,
        common=tuple(common),
        task=given.task,
        limit=limit,
    )
    print("| parts | KL | to none | bytes | seconds | GB |")
    print("|---|--:|--:|--:|--:|--:|")
    first = None
    for name, options in rows(given.tune).items():
        found = [bench.measure(name, options, seed) for seed in range(given.seeds)]
        values = [kl for kl, _, _ in found]
        mean = statistics.fmean(values)
        first = first or mean
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        seconds = statistics.median(cost.seconds for _, cost, _ in found)
        memory = max(cost.memory for _, cost, _ in found)
        print(
            f"| {name} | {mean:.4f}{spread} | {mean / first:.2f} | {max(n for *_, n in found):,} "
            f"| {seconds:.0f} | {memory:.1f} |",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench_ingredients")
    parser.add_argument("model")
    parser.add_argument("--target", default="3bit")
    parser.add_argument("--runtime", default="transformers")
    parser.add_argument("--task", default="wikitext")
    parser.add_argument("--limit")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", default="build/ingredients")
    parser.add_argument("--from", dest="caller", type=Path, default=Path.cwd())
    return parser.parse_args()


if __name__ == "__main__":
    main()
