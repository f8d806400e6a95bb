#!/usr/bin/env python3
"""What `scripts/bench_frontier` runs: `cptq compress` to given sizes in several ways.

The figure to compare by is ln(perplexity / dense perplexity) at equal bytes. A GGUF's bytes are
those of the exported file; its perplexity is that of the artifact that it was exported from, whose
weights it holds exactly. A way that cannot reach a size is left out, with what cptq said.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from _runs import count_weight_bytes, read_metric, run

#: way -> options of `cptq compress`
WAYS = {
    "portable": (),
    "packed": ("--runtime", "cptq"),
    "even": ("--runtime", "cptq", "--levels", "even"),
    "tuned": ("--runtime", "cptq", "--tune"),
    "gguf": ("--runtime", "llamacpp"),
}


@dataclass(frozen=True)
class Found:
    """Of one run: bytes of what ships, perplexity, KL, and the processor seconds of compress."""

    bytes: int
    perplexity: float
    kl: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Compresses and evaluates; remembers what it did in `out`."""

    model: Path
    out: Path
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]

    def measure(self, way: str, size: int, seed: int) -> Found:
        """Return what one way finds at one size with one seed."""
        place = self.out / f"{way}-{size}-{seed}"
        file = place.with_suffix(".json")
        if not file.exists():
            file.write_text(json.dumps(vars(self._run(way, size, seed, place))))
        return Found(**json.loads(file.read_text()))

    def _run(self, way: str, size: int, seed: int, place: Path) -> Found:
        fixed = ("--target", f"{size}B", "--seed", seed, "--no-check-uniform", *self.calibration)
        cost = run("compress", self.model, *WAYS[way], *fixed, "-o", place, "--overwrite")
        results = place.with_name(f"{place.name}-eval.json")
        against = ("--baseline", self.model, *self.evaluation)
        run("eval", place, *against, "-o", results, "--overwrite")
        return Found(
            bytes=self._export(place) if way == "gguf" else count_weight_bytes(place),
            perplexity=read_metric(results, "perplexity"),
            kl=read_metric(results, "kl"),
            seconds=cost.seconds,
        )

    def _export(self, place: Path) -> int:
        exported = place.with_name(f"{place.name}-gguf")
        run("export", place, "--format", "gguf", "-o", exported, "--overwrite")
        (file,) = exported.glob("*.gguf")
        return file.stat().st_size

    def measure_dense(self) -> float:
        """Return the dense model's perplexity."""
        results = self.out / "dense-eval.json"
        if not results.exists():
            run("eval", self.model, *self.evaluation, "-o", results)
        return read_metric(results, "perplexity")


def show(tool: str, size: int, perplexity: float, dense: float, rest: str = "| |") -> None:
    """Print one row."""
    share = math.log(perplexity / dense)
    print(f"| {tool} | {size:,} | {perplexity:.2f} | {share:.3f} {rest}", flush=True)


def show_way(bench: Bench, way: str, size: int, seeds: int, dense: float) -> None:
    """Measure and print one row of ours."""
    try:
        found = [bench.measure(way, size, seed) for seed in range(seeds)]
    except SystemExit as error:
        print(f"scripts/bench_frontier: {way} at {size:,} bytes: {error}", file=sys.stderr)
        return
    values = [one.perplexity for one in found]
    spread = f" ± {statistics.stdev(values):.2f}" if seeds > 1 else ""
    kl = statistics.fmean(one.kl for one in found)
    seconds = statistics.median(one.seconds for one in found)
    bytes_ = max(one.bytes for one in found)
    rest = f"| {kl:.4f}{spread} | {seconds:.0f} |"
    show(f"cptq {way}", bytes_, statistics.fmean(values), dense, rest)


def main() -> None:
    """Measure every row and print the table."""
    given = parse_arguments()
    out = (given.caller / given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        model=(given.caller / given.model).resolve(),
        out=out,
        calibration=("--calibration", given.calibration) if given.calibration else (),
        evaluation=("--task", given.task, *(("--limit", given.limit) if given.limit else ())),
    )
    dense = bench.measure_dense()
    print("| tool | bytes | perplexity | ln(ratio) | KL ± spread of perplexity | seconds |")
    print("|---|--:|--:|--:|--:|--:|")
    peers = json.loads((given.caller / given.peers).read_text()) if given.peers else []
    for peer in sorted(peers, key=lambda row: -row["bytes"]):
        show(peer["tool"], peer["bytes"], peer["perplexity"], dense)
    for size in sorted(given.sizes, reverse=True):
        for way in given.ways:
            show_way(bench, way, size, given.seeds, dense)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench_frontier")
    parser.add_argument("model")
    parser.add_argument("--sizes", type=_read_sizes, required=True)
    parser.add_argument("--ways", type=_read_ways, default=["portable", "packed", "gguf"])
    parser.add_argument("--peers")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--task", default="wikitext")
    parser.add_argument("--limit")
    parser.add_argument("--calibration")
    parser.add_argument("--out", default="build/frontier")
    parser.add_argument("--from", dest="caller", type=Path, default=Path.cwd())
    return parser.parse_args()


def _read_sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _read_ways(text: str) -> list[str]:
    ways = text.split(",")
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not among {', '.join(WAYS)}")
    return ways


if __name__ == "__main__":
    main()
