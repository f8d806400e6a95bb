#!/usr/bin/env python3
"""Measure activation sparsity: method x share, beside the same weights with all inputs.

    scripts/bench_activations MODEL [--bits 4] [--shares 25%,40%,50%,65%] [--methods teal,wina]

Every linear of the blocks is compressed once, to the same width; embeddings and head stay at 16
bits. Then each method fits its rules to the calibration text, and is measured on held-out text that
nothing was fitted to:

- divergence from the model with dense weights, mean per token (of a classifier per example) with
  standard error over windows, and of a causal language model the ratio of perplexities to it;
- the share of all products with the linears of the blocks that its rules drop there;
- of a causal language model milliseconds per token (on a CPU processor time), decoding one token
  after the other from the packed weights, by the rules and with all inputs: each the least of some
  turns.

One run, one model in memory; the packed file goes to a temporary directory.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_sparsity import add_run_arguments, build_plan, ignore, load_model

import cptq
from cptq.activation_sparsity import METHODS
from cptq.activation_sparsity.walk import apply_rules, find_function, fit_rules
from cptq.artifact.content import build_content
from cptq.artifact.formats.packed import PACKED
from cptq.calibration.divergence_from_dense import DivergenceFromDense
from cptq.calibration.objective import choose_objective
from cptq.compression.blockwise import compress_model
from cptq.config import parse_activation_sparsity
from cptq.errors import UsageError
from cptq.inference.activations import DroppedInputs, without_activation_sparsity
from cptq.inference.generation import decode
from cptq.inference.modules import PackedLinear, remove_rules
from cptq.numerics.standard_error import compute_standard_error
from cptq.pipeline.inputs import CompressInputs
from cptq.types import ActivationRule, Candidate

TURNS, PROMPT = 5, 16


def measure_nll(divergence: DivergenceFromDense) -> float:
    """Mean loss in nats per token of the model as it is now."""
    total, count = 0.0, 0
    for _, now_RV, next_R in divergence.iterate_rows():
        assert next_R is not None, "perplexity needs a causal language model"
        known = next_R >= 0
        losses = torch.nn.functional.cross_entropy(
            now_RV[known].float(), next_R[known], reduction="none"
        )
        total += float(losses.double().sum())
        count += int(known.sum())
    return total / count


def load_packed(inputs: CompressInputs, layers: Any) -> Any:
    """Write the packed file and load it as users do."""
    with tempfile.TemporaryDirectory() as folder:
        content = build_content(inputs.model, layers, ignore)
        PACKED.write(content, Path(folder), ignore)
        return cptq.load(folder, device=str(inputs.model.device))


def set_rules(packed: Any, rules: Mapping[str, ActivationRule]) -> None:
    """Have a packed model drop inputs by other rules."""
    remove_rules(packed)
    for name, rule in rules.items():
        module = packed.get_submodule(name)
        assert isinstance(module, PackedLinear)
        module.set_rule(rule.label)
        for part, value in module.rule_tensors.items():
            value.data = rule.tensors[part].to(value)


def time_tokens(packed: Any, tokens: int) -> tuple[float, float, str]:
    """Return milliseconds per token by the rules and without, and how it was decoded.

    Both by turns, as others may use the machine.
    """
    ids = torch.arange(3, 3 + PROMPT, device=packed.device)[None]
    clock = time.process_time if packed.device.type == "cpu" else time.perf_counter
    taken: dict[bool, list[float]] = {True: [], False: []}
    for ruled in (True, False) * TURNS:
        with nullcontext() if ruled else without_activation_sparsity():
            began = clock()
            decode(packed, ids, new_tokens=1)
            prompt = clock() - began
            began = clock()
            found = decode(packed, ids, new_tokens=tokens + 1)
            taken[ruled].append(clock() - began - prompt)
    return min(taken[True]) / tokens * 1e3, min(taken[False]) / tokens * 1e3, found.way


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--shares", default="25%,40%,50%,65%")
    add_run_arguments(parser)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    inputs = load_model(asked, bits=f"{asked.bits},16")
    group = inputs.settings.group_size
    bench = Bench(inputs, Candidate(bits=int(asked.bits), group_size=group), asked)
    bench.show("none", {})
    for name in asked.methods.split(","):
        for share in ("",) if name == "exact" else asked.shares.split(","):
            bench.run(f"{name}:{share}".removesuffix(":"))


class Bench:
    """A model with compressed weights, what the dense one made of the text, and the packed one."""

    def __init__(self, inputs: CompressInputs, candidate: Candidate, asked: Any) -> None:
        model = inputs.model
        self.inputs, self.model, self.tokens = inputs, model, asked.tokens
        objective = choose_objective(model.kind, model.config)
        self.divergence = DivergenceFromDense(model, inputs.held_out.judge, objective, units=False)
        self.causal = model.kind == "causal-lm"
        self.dense = measure_nll(self.divergence) if self.causal else 0.0
        plan = build_plan(inputs, candidate)
        layers = compress_model(
            model,
            inputs.calibration,
            plan,
            compressor=inputs.settings.compressor,
            layout=inputs.space.layout,
            emit=ignore,
        )
        self.specs = [layer.spec for layer in layers if layer.spec.block is not None]
        self.packed = load_packed(inputs, layers) if self.causal else None
        counted = f"{self.divergence.tokens:,} tokens in {self.divergence.samples}"
        print(f"{counted} {self.divergence.sample_name}s, weights as {candidate.label}")
        speed = "ms/token / all inputs | decoded by"
        print(f"| inputs | divergence | perplexity ratio | dropped | {speed} |", flush=True)
        print("|---|--:|--:|--:|--:|---|")

    def run(self, option: str) -> None:
        """Fit a method and show its row, or why there is none."""
        name, share = parse_activation_sparsity(option)
        method = METHODS.get(name)
        try:
            labels = method.list_rules(self.specs, find_function(self.model.config))
        except UsageError as error:
            print(f"| {option} | {error} | | | | |")
            return
        rules, _ = fit_rules(
            self.model, self.inputs.calibration.batches, method, share or 1.0, labels, ignore
        )
        self.show(option, rules)

    def show(self, option: str, rules: Mapping[str, ActivationRule]) -> None:
        """Measure with rules and print the row."""
        counts: dict[str, DroppedInputs] = {}
        with apply_rules(self.model, rules, counts) if rules else nullcontext():
            rows = self.divergence.measure_rows()
            now = measure_nll(self.divergence) if self.causal else 0.0
        error = compute_standard_error(rows, self.divergence.window_R)
        dropped = sum(counts[x.name].share * x.numel for x in self.specs if x.name in counts)
        dropped /= sum(spec.numel for spec in self.specs)
        ratio = f"{math.exp(now - self.dense):.3f}" if self.causal else ""
        row = f"{option} | {float(rows.mean()):.4f} ± {error:.4f} | {ratio}"
        print(f"| {row} | {dropped:.1%} | {self.time(rules)} |", flush=True)

    def time(self, rules: Mapping[str, ActivationRule]) -> str:
        """The two cells about speed, empty where the model does not decode."""
        if self.packed is None:
            return " | "
        set_rules(self.packed, rules)
        took, usual, way = time_tokens(self.packed, self.tokens)
        return f"{took:.2f} / {usual:.2f} | {way}"


if __name__ == "__main__":
    main()
