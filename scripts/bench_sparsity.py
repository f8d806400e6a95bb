#!/usr/bin/env python3
"""Measure sparse weights: score x pattern x profile, beside fewer bits without zeros.

    scripts/bench_sparsity MODEL [--bits 4] [--sparsity 30%,50%,2:4,4:8] [--profiles uniform,erk]

Every linear of the blocks gets the same width and pattern; embeddings and head stay at 16 bits.
Printed for each: bytes of the whole file, and the mean divergence from the dense model on held-out
calibration text (that nothing was fitted to) with its standard error over windows. One run, one
model in memory: nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.compression.blockwise import compress_model
from cptq.compression.scores import SCORES
from cptq.config import CompressSettings, parse_sparsity, settings_from
from cptq.errors import CptqError
from cptq.numerics.standard_error import compute_standard_error
from cptq.pipeline.inputs import CompressInputs, load_inputs
from cptq.pipeline.profile import build_masking, spread_zeros
from cptq.pipeline.recorder import Recorder
from cptq.types import Candidate, Event, Plan


def ignore(_event: Event) -> None:
    """Take no notice."""


def build_plan(inputs: CompressInputs, candidate: Candidate) -> Plan:
    """Return the plan that gives every linear of the blocks one candidate."""
    cost = inputs.space.cost
    dense = Candidate(bits=16)
    choices = {
        unit.name: dense
        if unit.block is None or cost.explain_refusal(unit.name, candidate)
        else candidate
        for unit in cost.units
    }
    assert inputs.ledger is not None
    return Plan(
        model_fingerprint=inputs.model.fingerprint,
        budget=inputs.ledger.budget,
        allocator="bench",
        metric=None,
        table_digest=None,
        choices=choices,
        predicted_bytes=cost.file_bytes(choices),
        predicted_loss=None,
    )


def measure(
    inputs: CompressInputs, candidate: Candidate, divergence: DivergenceFromDense
) -> tuple[int, float, float, float]:
    """Return bytes, mean divergence, its standard error, and processor seconds."""
    began = time.process_time()
    plan = spread_zeros(inputs, build_plan(inputs, candidate), ignore)
    compress_model(
        inputs.model,
        inputs.calibration,
        plan,
        compressor=inputs.settings.compressor,
        layout=inputs.space.layout,
        masking=build_masking(inputs.settings),
        emit=ignore,
    )
    seconds = time.process_time() - began
    rows = divergence.measure_rows()
    inputs.model.restore_dense()
    error = compute_standard_error(rows, divergence.window_R)
    return plan.predicted_bytes, float(rows.mean()), error, seconds


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how every row of a table is compressed."""
    parser.add_argument("--samples", default="64")
    parser.add_argument("--seqlen", default="256")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--compressor", default="gptq")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")


def load_model(asked: argparse.Namespace, **more: str) -> CompressInputs:
    """Load the model and text of `asked` for the packed format, with `more` options of compress."""
    given = {
        "model": asked.model,
        "runtime": "cptq",
        "samples": int(asked.samples),
        "seqlen": int(asked.seqlen),
        "compressor": asked.compressor,
        "device": asked.device,
        "dtype": asked.dtype,
        "target": "16bit",
        **more,
    }
    if asked.calibration:
        given["calibration"] = asked.calibration
    try:
        return load_inputs(settings_from(CompressSettings, given), Recorder(ignore), writes=False)
    except CptqError as error:
        sys.exit(f"Error: {error}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--dense-bits", default="2,3,4")
    parser.add_argument("--sparsity", default="30%,50%,2:4,4:8")
    parser.add_argument("--scores", default=",".join(SCORES))
    parser.add_argument("--profiles", default="uniform")
    add_run_arguments(parser)
    asked = parser.parse_args()
    inputs = load_model(asked, bits="2,3,4,8,16", sparsity=asked.sparsity)
    settings, group = inputs.settings, inputs.settings.group_size
    model = inputs.model
    objective = choose_objective(model.kind, model.config)
    divergence = DivergenceFromDense(model, inputs.held_out.judge, objective, units=False)
    print(f"{divergence.tokens:,} tokens in {divergence.samples} {divergence.sample_name}s")
    print("| candidate | score | profile | bytes | divergence | seconds |")
    print("|---|---|---|--:|--:|--:|")
    for bits in asked.dense_bits.split(","):
        show(inputs, Candidate(bits=int(bits), group_size=group), "", "", divergence)
    for word in asked.sparsity.split(","):
        share, pattern = parse_sparsity(word)
        candidate = Candidate(
            bits=int(asked.bits), group_size=group, sparsity=share, pattern=pattern
        )
        for profile in asked.profiles.split(","):
            for score in asked.scores.split(","):
                changed = replace(settings, sparsity_score=score, sparsity_profile=profile)
                run = replace(inputs, settings=changed)
                show(run, candidate, score, profile, divergence)


def show(
    inputs: CompressInputs,
    candidate: Candidate,
    score: str,
    profile: str,
    divergence: DivergenceFromDense,
) -> None:
    """Measure one row and print it."""
    nbytes, mean, error, seconds = measure(inputs, candidate, divergence)
    row = f"{candidate.label} | {score} | {profile} | {nbytes:,} | {mean:.4f} ± {error:.4f}"
    print(f"| {row} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
