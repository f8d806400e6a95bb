"""CPTQuant's algorithm as the paper has it, beside cptq's at the same bytes; for reproduce_paper.

The paper's: score the blocks (`cptq.sensitivity.block_scores`), cluster the scores by KMeans(3),
give all units of a block 16, 8 or 4 bits (`cptq.allocation.block_clusters`). Its bytes are an
outcome. Every opponent then has exactly these bytes as its budget: the knapsack on `output`, and on
`kl` where it is measured, and `even`, which asks no score. Each is offered all widths, and 16, 8
and 4 alone: the first shows what cptq gains, the second what it gains with the paper's widths.
Three other widths, such as 4, 3 and 2, try the paper's scores where bytes are scarce: at those of
16, 8 and 4 bits a uniform plan of 8 bits often fits, and leaves little to choose.

All plans are carried out by one compressor in one trial model and judged by their divergence from
the dense model on rows that neither calibrated nor chose. Rows of one window are not independent,
so the samples are windows of a language model, examples of any other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

#: what opponents are called that may use any width
ALL_WIDTHS = "all widths"
#: bits of the clusters, the most sensitive first
Widths = tuple[int, ...]
#: a ratio further from 1 than so many standard errors is shown in bold
CLEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What to measure. `judge`: parts of held-out text (see `cptq.calibration.holdout`)."""

    model: str
    calibration: str
    samples: int | None
    compressor: str
    kl: bool
    judge: int


def measure_seeds(
    setup: Setup, widths: Sequence[Widths], place: Path, seeds: int
) -> dict[Widths, list[dict[str, Any]]]:
    """The results of all seeds for each three widths, measured where `place` lacks them."""

    def find(bits: Widths, seed: int) -> Path:
        return place / f"blocks-{'-'.join(map(str, bits))}-{setup.compressor}-{seed}.json"

    for seed in range(seeds):
        missing = [bits for bits in widths if not find(bits, seed).exists()]
        for bits, result in measure_seed(setup, missing, seed) if missing else ():
            place.mkdir(parents=True, exist_ok=True)
            draft = find(bits, seed).with_suffix(".draft")
            draft.write_text(json.dumps(result))
            draft.replace(find(bits, seed))
    return {
        bits: [json.loads(find(bits, seed).read_text()) for seed in range(seeds)] for bits in widths
    }


def measure_seed(
    setup: Setup, widths: Sequence[Widths], seed: int
) -> Iterator[tuple[Widths, dict[str, Any]]]:
    """Score blocks and units; then, for each three widths, make, carry out and judge all plans."""
    from cptq.config import AnalyzeSettings, CalibrationSettings, ModelSettings
    from cptq.pipeline.inputs import calibrate, load_dense
    from cptq.pipeline.recorder import Recorder
    from cptq.sensitivity.block_scores import measure_blocks
    from cptq.sensitivity.measure import measure

    report(f"{setup.model}, seed {seed}: scores")
    began = time.perf_counter()
    text = CalibrationSettings(calibration=setup.calibration, seed=seed)
    text = replace(text, samples=setup.samples or text.samples)
    # the paper's grids: one 16-bit scale per group
    settings = AnalyzeSettings(
        model=ModelSettings(model=setup.model), calibration=text, scales="16bit"
    )
    recorder = Recorder(lambda event: None)
    model = load_dense(settings, recorder, conv1d=True)
    calibration = calibrate(model, settings, recorder, parts=setup.judge)
    found = measure_blocks(model, calibration, seed=seed, emit=recorder)
    bench = Bench(setup, settings, model, calibration, recorder)
    tables = measure(
        model,
        calibration,
        metrics=("output", "kl") if setup.kl else ("output",),
        candidates=bench.candidates,
        seed=seed,
        emit=recorder,
        compress=bench.trial.weights,
    )
    facts = {
        "seed": seed,
        "compressor": setup.compressor,
        "unit": bench.objective.unit,
        "judge_tokens": bench.divergence.tokens,
        "stored_bytes": bench.cost.dense_bytes,
        "scores": {
            name: {
                "unit": by.unit,
                "scores": [*by.scores.values()],
                "spread": [*by.spread.values()],
            }
            for name, by in found.items()
        },
        "warnings": [f"{n.subject}: {n.message}" for n in recorder.notices if n.kind != "info"],
    }
    scores = {name: by.scores for name, by in found.items()}
    for bits in widths:
        report(f"{setup.model}, seed {seed}: plans of {spell(bits)} bits")
        plans = bench.run(bits, scores, tables)
        yield bits, facts | {"bits": bits, "plans": plans, "seconds": time.perf_counter() - began}
        began = time.perf_counter()


def report(message: str) -> None:
    """Progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def spell(bits: Widths) -> str:
    """`16/8/4`."""
    return "/".join(map(str, bits))


class Bench:
    """One model in which plans are carried out, and the rows that judge them."""

    def __init__(
        self, setup: Setup, settings: Any, model: Any, calibration: Any, recorder: Any
    ) -> None:
        from cptq.allocation.cost import CostModel
        from cptq.calibration.divergence_from_dense import DivergenceFromDense
        from cptq.calibration.holdout import split_parts
        from cptq.calibration.objective import choose_objective
        from cptq.pipeline.candidates import build_candidates
        from cptq.pipeline.inputs import build_cost_model, offer_vocabulary
        from cptq.pipeline.trial_model import build_trial_model

        self.settings, self.model, self.emit = settings, model, recorder
        self.candidates = build_candidates(settings, model)
        vocabulary = offer_vocabulary(model, self.candidates)
        usual = build_cost_model(model, settings, vocabulary)
        # the paper has blocks alone: embeddings and heads stay dense on both sides
        self.cost = CostModel(model.units, usual.tensors, usual.layout, usual.runtime)
        self.objective = choose_objective(model.kind, model.config)
        rows = split_parts(model, calibration.held_out, 1)[0]
        self.divergence = DivergenceFromDense(model, rows, self.objective, units=False)
        self.trial = build_trial_model(
            model,
            calibration,
            setup.compressor,
            self.cost,
            self.candidates,
            seed=settings.calibration.seed,
            emit=recorder,
        )
        self.known: dict[tuple[Any, ...], list[float]] = {}

    def run(
        self, bits: Widths, scores: Mapping[str, Mapping[int, float]], tables: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The paper's plan by each score, and the opponents at its bytes."""
        from cptq.allocation.block_clusters import assign_by_blocks, build_levels

        levels = build_levels(bits, self.settings.group_size)
        found = []
        with self.trial.restore_after():
            for name, per_block in scores.items():
                plan = assign_by_blocks(per_block, self.cost, levels)
                paper = self.judge(plan.choices)
                size = paper["file_bytes"]
                paper |= {
                    "algorithm": name,
                    "blocks": [level.bits for level in plan.blocks.values()],
                    "notes": list(plan.notes),
                    "opponents": dict(self.oppose(bits, size, tables, levels)),
                }
                found.append(paper)
        return found

    def oppose(
        self, bits: Widths, size: int, tables: Mapping[str, Any], levels: Sequence[Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each opponent with its result at so many bytes."""
        from cptq.allocation.allocate import allocate
        from cptq.allocation.ledger import build_ledger
        from cptq.types import Budget

        ways: list[tuple[str, str, Any]] = [
            (metric, "knapsack", table) for metric, table in tables.items()
        ]
        budget = Budget(limit_bytes=size, asked=f"{size}B")
        for name, allocator, table in [*ways, ("even", "even", None)]:
            for words, widths in ((ALL_WIDTHS, self.candidates), (spell(bits), levels)):
                plan = allocate(
                    allocator,
                    table,
                    build_ledger(budget, self.cost, widths),
                    widths,
                    model_fingerprint=self.model.fingerprint,
                    emit=self.emit,
                )
                yield f"{name}, {words}", self.judge(plan.choices)

    def judge(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Carry a plan out: its size, and its divergence on every sample; equal plans once."""
        key = tuple(choices[unit.name] for unit in self.model.units)
        if key not in self.known:
            self.trial.apply_choices(choices)
            self.known[key] = self.average_samples(self.divergence.measure_rows())
        size = self.cost.make_size_report(choices)
        return {
            "file_bytes": size.file_bytes,
            "effective_bits": size.effective_bits,
            "samples": self.known[key],
            "choices": {name: choice.label for name, choice in choices.items()},
        }

    def average_samples(self, rows_R: Any) -> list[float]:
        """The mean of each window of a language model; elsewhere a row is an example."""
        window_R = self.divergence.window_R
        return [float(rows_R[window_R == w].mean()) for w in range(self.divergence.samples)]


@dataclass(frozen=True)
class Ratio:
    """Ours to the paper's, and the standard error of its logarithm."""

    value: float
    log_error: float

    @property
    def clear(self) -> bool:
        """Whether it is not 1."""
        return abs(log(self.value)) > CLEAR * self.log_error


def compare(ours: Sequence[float], paper: Sequence[float]) -> Ratio:
    """The ratio r of two means over the same samples.

    Its standard error is that of the mean of ours - r paper, over the paper's mean (delta method):
    what a sample adds to both cancels.
    """
    a, b = fmean(ours), fmean(paper)
    if a == b or b <= 0 or a <= 0:
        return Ratio(1.0 if a == b else max(a, 1e-12) / max(b, 1e-12), 0.0)
    value, n = a / b, len(paper)
    squares = sum((x - value * y) ** 2 for x, y in zip(ours, paper, strict=True))
    return Ratio(value, (squares / max(n - 1, 1) / n) ** 0.5 / a)


def combine(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean over seeds.

    The error is that of one seed's samples: seeds draw from one text, so they are not counted as
    independent.
    """
    logs = [log(ratio.value) for ratio in ratios]
    return Ratio(exp(fmean(logs)), fmean(r.log_error**2 for r in ratios) ** 0.5)


def spell_ratio(ratios: Sequence[Ratio]) -> str:
    """`**0.31 ± 0.02** (0.25 to 0.36)`: bold where it is clear, the range over seeds behind it."""
    whole = combine(ratios)
    text = f"{whole.value:.3g} ± {whole.value * whole.log_error:.2g}"
    text = f"**{text}**" if whole.clear else text
    values = [ratio.value for ratio in ratios]
    return text + (f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else "")


def list_rows(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of one model: columns, and a row per algorithm of the paper."""
    opponents = list(runs[0]["plans"][0]["opponents"])
    first = opponents[0]
    bits = runs[0]["bits"]
    columns = [
        "algorithm",
        f"blocks of {spell(bits)} bits",
        "file bytes",
        "bits",
        "divergence",
    ]
    columns += [f"ours: {first}", *(f"ratio: {name}" for name in opponents)]
    rows = []
    for index, plan in enumerate(runs[0]["plans"]):
        plans = [run["plans"][index] for run in runs]
        ratios = {
            name: [compare(p["opponents"][name]["samples"], p["samples"]) for p in plans]
            for name in opponents
        }
        rows.append(
            [
                plan["algorithm"],
                ", ".join(dict.fromkeys(count_blocks(p["blocks"], bits) for p in plans)),
                spell_range([p["file_bytes"] for p in plans], ",.0f"),
                spell_range([p["effective_bits"] for p in plans], ".2f"),
                spell_range([fmean(p["samples"]) for p in plans], ".3g"),
                spell_range([fmean(p["opponents"][first]["samples"]) for p in plans], ".3g"),
                *(spell_ratio(ratios[name]) for name in opponents),
            ]
        )
    return columns, rows


def count_blocks(blocks: Sequence[int], bits: Sequence[int]) -> str:
    """`1/2/3`: how many blocks have each of these widths."""
    return "/".join(str(sum(width == level for width in blocks)) for level in bits)


def spell_range(values: Sequence[float], form: str) -> str:
    """`1 to 3` over the seeds, or the one value."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def describe(runs: Sequence[Mapping[str, Any]]) -> str:
    """What stands above the table of one model."""
    run = runs[0]
    samples = len(run["plans"][0]["samples"])
    notes = dict.fromkeys(note for r in runs for plan in r["plans"] for note in plan["notes"])
    minutes = sum(run["seconds"] for run in runs) / 60
    text = (
        f"{run['unit']}, rounded by {run['compressor']}; seeds: {len(runs)} ({minutes:.1f} min); "
    )
    text += f"{run['judge_tokens']:,} tokens in {samples} samples judge; the file takes "
    text += f"{run['stored_bytes']:,} bytes as it came."
    return text + "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
