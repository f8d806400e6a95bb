#!/usr/bin/env python3
"""What `scripts/reproduce_paper` runs: two parts per model, each of which ends in Markdown tables.

- `blocks` (scripts/_paper_blocks.py): the paper's algorithm itself, beside cptq's at equal bytes;
- `units`: `cptq analyze --validate`, the paper's metrics on cptq's units.

The paper's tables are no target: its released code quantizes nothing (see the project's notes on
its defects). What is examined are its claims, with the three scorers corrected, on text that
neither calibrated nor chose.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from typing import Any

from _paper_blocks import Setup, Widths, describe, list_rows, measure_seeds
from _uses import find_use

#: the paper's names of the metrics; the others are shown beside them
PAPER = {"cca": "CMPQ", "pruning": "PMPQ", "taylor": "TDMPQ"}
METRICS = (*PAPER, "output")
ALLOCATORS = ("cluster", "knapsack")
TARGETS = ("2.5bit", "3bit", "4bit")
AT_HAND = ("smollm2-135m-dithered", "stories260k", "minilm-l6-sst2", "all-MiniLM-L6-v2")
#: weight files up to this many bytes have every unit's divergence measured without being asked
SMALL = 100_000_000


def at_hand() -> list[str]:
    """The default models that are there."""
    places = [Path("build/models"), Path(os.environ.get("CPTQ_ASSETS", "")) / "models"]
    found = {name: place / name for name in AT_HAND for place in places if (place / name).is_dir()}
    for name in AT_HAND:
        if name not in found:
            print(f"skipped: {name} is not at hand", file=sys.stderr)
    return [str(path.resolve()) for path in found.values()]


def cptq(*words: object) -> None:
    """Run one command, its progress on stderr."""
    line = [sys.executable, "-m", "cptq", *map(str, words)]
    print("$ cptq", *line[3:], file=sys.stderr, flush=True)
    done = subprocess.run(line, stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"stopped: cptq {words[0]} failed (above); what is measured is kept in --out")


class Study:
    """One model: what was found about it, measured when it is not there yet."""

    def __init__(self, model: str, given: argparse.Namespace) -> None:
        self.model, self.given = model, given
        self.name = Path(model).name
        self.place = given.out / self.name
        self.use, self.calibration, self.task = find_use(model)

    def _small(self) -> bool:
        files = list(Path(self.model).glob("*.safetensors"))
        return bool(files) and sum(file.stat().st_size for file in files) <= SMALL

    def report(self) -> dict[str, Any]:
        """The report of `cptq analyze --validate`."""
        if not (self.place / "report.json").exists():
            metrics = [*(self.given.metric or METRICS)]
            metrics += ["kl"] if self.given.kl or self._small() else []
            words: list[object] = ["analyze", self.model, "--validate", "-o", self.place]
            for option, values in (
                ("--metric", metrics),
                ("--allocator", ALLOCATORS),
                ("--target", self.given.target or TARGETS),
            ):
                words += [word for value in values for word in (option, value)]
            words += ["--calibration", self.given.calibration or self.calibration]
            if self.given.samples:
                words += ["--samples", self.given.samples]
            if self.given.compressor:
                words += ["--compressor", self.given.compressor]
            cptq(*words)
        found: dict[str, Any] = json.loads((self.place / "report.json").read_text())
        return found

    def blocks(self, widths: list[Widths]) -> dict[Widths, list[dict[str, Any]]]:
        """The paper's algorithm with each three widths, and its opponents; one result per seed."""
        setup = Setup(
            model=self.model,
            calibration=self.given.calibration or self.calibration,
            samples=int(self.given.samples) if self.given.samples else None,
            compressor=self.given.compressor or "gptq",
            kl=self.given.kl or self._small(),
            judge=self.given.judge,
        )
        return measure_seeds(setup, widths, self.place, self.given.seeds)

    def evaluated(self, report: dict[str, Any], trial: dict[str, Any]) -> float | None:
        """The task's first number with a plan carried out by GPTQ."""
        if not self.given.eval or self.task is None:
            return None
        label = f"{trial['target']}-{trial['metric'] or 'blind'}-{trial['allocator']}"
        folder, file = self.place / "plans" / label, self.place / "plans" / f"{label}-eval.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            plan = self.place / "plans" / f"{label}-plan.json"
            plan.write_text(json.dumps(plan_data(report, trial)))
            if not folder.exists():
                text = ["--calibration", self.given.calibration or self.calibration]
                text += ["--samples", self.given.samples] if self.given.samples else []
                cptq("compress", self.model, "--plan", plan, *text, "-o", folder)
            limit = ["--limit", self.given.limit] if self.given.limit else []
            cptq("eval", folder, "--task", self.task, *limit, "-o", file)
        return float(json.loads(file.read_text())["evaluation"][0]["value"])


def plan_data(report: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """A plan that `cptq compress --plan` carries out."""
    return {
        "model_fingerprint": report["model"]["fingerprint"],
        # a trial's limit is that of the whole file, whatever the target
        "budget": {"limit_bytes": trial["limit_bytes"], "asked": trial["target"], "scope": "file"},
        "allocator": trial["allocator"],
        "metric": trial["metric"],
        "table_digest": None,
        "choices": trial["choices"],
        "predicted_bytes": trial["file_bytes"],
        "predicted_loss": None,
    }


def called(metric: str | None) -> str:
    """`CMPQ (cca)`."""
    if metric is None:
        return "no score"
    return f"{PAPER[metric]} ({metric})" if metric in PAPER else metric


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table on stdout."""
    print("|", " | ".join(columns), "|")
    print("|" + "|".join("---" if k < 2 else "--:" for k in range(len(columns))) + "|")
    for row in rows:
        print("|", " | ".join(row), "|")
    print()


def show_blocks(studies: list[Study], widths: list[Widths]) -> None:
    """The paper's algorithm itself."""
    print("## The paper's algorithm: blocks, KMeans(3), three widths\n")
    print("Beside it, at its bytes, cptq's. A ratio is ours to the paper's divergence, below 1 =")
    print("ours is better; ± the standard error over samples; bold: over two of them from 1; in")
    print("brackets the range over seeds.\n")
    for study in studies:
        for runs in study.blocks(widths).values():
            print(f"### {study.name} ({study.use})\n")
            print(describe(runs), end="\n\n")
            table(*list_rows(runs))


def show_depths(studies: list[tuple[Study, dict[str, Any]]]) -> None:
    """Claim 1."""
    print("## Are the first and last 30% of the blocks the sensitive ones?\n")
    print("Score over the average score of the same role and width, geometric mean; above 1 = more")
    print("sensitive. The measured truth is the divergence of one unit rounded alone.\n")
    rows = []
    for study, report in studies:
        for name, row in report["validation"]["depths"].items():
            by = called(name) if name != "measured truth" else f"**{name}**"
            where = [f"{row[d]:.2f}" if d in row else "-" for d in ("first", "middle", "last")]
            rows.append([study.name, by, *where])
    table(["model", "by", "first 30%", "middle", "last 30%"], rows)


def show_ranks(studies: list[tuple[Study, dict[str, Any]]]) -> None:
    """What each score is worth."""
    print("## Does a score rank units as the truth does, within a width?\n")
    rows = []
    for study, report in studies:
        for row in report["validation"]["agreements"]:
            both = [row["spearman_within"], row["kendall_within"]]
            cells = [f"{x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in both]
            rows.append([study.name, called(row["metric"]), *cells, f"{row['seconds']:.1f}"])
    table(["model", "metric", "Spearman (95%)", "Kendall (95%)", "seconds"], rows)


def show_plans(studies: list[tuple[Study, dict[str, Any]]]) -> None:
    """Claim 2, in full."""
    print("## Whole models at the same bytes\n")
    for study, report in studies:
        found, stored = report["validation"], stored_bytes(report)
        print(f"### {study.name} ({study.use}; {stored:,} bytes as it came)\n")
        print(
            f"{found['unit']}, rounded by {found['compressor']}; {found['judge_tokens']:,} tokens"
        )
        print(f"that neither calibrated nor chose. Regret is against {found['reference']}.\n")
        task = study.task if study.given.eval else None
        columns = ["target", "plan", "file bytes", "of what came", "bits", "divergence", "to even"]
        columns += ["regret"] + ([task] if task else [])
        table(columns, list(plan_rows(study, report, task)))


def stored_bytes(report: dict[str, Any]) -> int:
    """Bytes in the checkpoint's own type: what stays dense keeps it, 4 each where it is float32."""
    model = report["model"]
    return int(model["parameters"]) * (4 if model["dtype"] == "F32" else 2)


def plan_rows(study: Study, report: dict[str, Any], task: str | None) -> Iterator[list[str]]:
    found, stored = report["validation"], stored_bytes(report)
    for trial in found["trials"]:
        same = [t for t in found["trials"] if t["target"] == trial["target"]]
        blind = next(t for t in same if t["metric"] is None)
        of = [t for t in same if t["metric"] == found["reference"] and t["metric"]]
        best = next((t for t in of if t["allocator"] == "knapsack"), None)
        row = [
            trial["target"],
            f"{called(trial['metric'])}, {trial['allocator']}",
            f"{trial['file_bytes']:,}",
            f"{trial['file_bytes'] / stored:.3f}",
            f"{trial['effective_bits']:.3f}",
            f"{trial['divergence']:.4g}",
            f"{trial['divergence'] / blind['divergence']:.3f}",
            f"{trial['divergence'] - best['divergence']:+.3g}" if best else "-",
        ]
        value = study.evaluated(report, trial) if task else None
        yield row + ([f"{value:.4g}"] if value is not None else [])


def show_verdicts(studies: list[tuple[Study, dict[str, Any]]]) -> None:
    """Claim 2, in short: the geometric mean over targets of divergence / even's."""
    print("## Which allocates best?\n")
    print(
        "Divergence as a multiple of that of the plan that asks no score, geometric mean over the"
    )
    print("targets; below 1 = better than uniform at the same bytes.\n")
    rows = []
    for study, report in studies:
        means = ratios(report["validation"]["trials"])
        paper = {key: value for key, value in means.items() if key[0] in PAPER}
        for key, value in sorted(means.items(), key=lambda item: item[1]):
            best = "**" if paper and value == min(paper.values()) else ""
            name = f"{best}{called(key[0])}, {key[1]}{best}"
            rows.append([study.use, study.name, name, f"{value:.3f}"])
    table(["use", "model", "plan (bold: best of the paper's three)", "to even"], rows)


def ratios(trials: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """{(metric, allocator): geometric mean over targets of the ratio to the blind plan}."""
    blind = {t["target"]: t["divergence"] for t in trials if t["metric"] is None}
    logs: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        if trial["metric"] is not None:
            value = log(max(trial["divergence"], 1e-12) / max(blind[trial["target"]], 1e-12))
            logs.setdefault((trial["metric"], trial["allocator"]), []).append(value)
    return {key: exp(sum(values) / len(values)) for key, values in logs.items()}


def show_units(studies: list[tuple[Study, dict[str, Any]]]) -> None:
    """The paper's metrics on units."""
    show_depths(studies)
    show_ranks(studies)
    show_verdicts(studies)
    show_plans(studies)


def three_widths(text: str) -> Widths:
    """`16,8,4` as numbers."""
    bits = tuple(int(word) for word in text.split(","))
    if len(bits) != 3 or not 16 >= bits[0] > bits[1] > bits[2] >= 2:
        raise argparse.ArgumentTypeError(f"{text} is not three widths that fall, such as 16,8,4")
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/reproduce_paper", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--part", choices=("blocks", "units"), action="append")
    parser.add_argument("--widths", type=three_widths, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge", type=int, default=1)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--kl", action="store_true")
    parser.add_argument("--target", action="append")
    parser.add_argument("--metric", action="append")
    parser.add_argument("--calibration")
    parser.add_argument("--samples")
    parser.add_argument("--limit")
    parser.add_argument("--compressor")
    parser.add_argument("--out", type=Path, default=Path("build/paper"))
    parser.add_argument("--from", dest="caller", type=Path, default=Path())
    given = parser.parse_args()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    local = {m: given.caller / m for m in given.models}
    models = [str(path.resolve()) if path.is_dir() else m for m, path in local.items()] or at_hand()
    if not models:
        sys.exit("no model is at hand; name one, a directory or a Hub id such as facebook/opt-125m")
    studies = [Study(model, given) for model in models]
    parts = given.part or ["blocks", "units"]
    if "blocks" in parts:
        show_blocks(studies, given.widths or [(16, 8, 4)])
    if "units" in parts:
        show_units([(study, study.report()) for study in studies])


if __name__ == "__main__":
    main()
