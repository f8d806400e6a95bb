#!/usr/bin/env python3
"""What single layers lose by GPTQ in each of ggml's types that --runtime llamacpp offers.

    scripts/bench_ggml_types MODEL [--layers 'layers\\.(5|15|25)\\.mlp\\.down_proj']

Printed for each type: bytes of the layer per weight, and the relative squared error of its outputs
on text that did not calibrate, as geometric mean over the layers whose names match. Inputs are
those of the dense model. Types that a layer does not fit are left out.
"""

from __future__ import annotations

import argparse
import math
import re
import time

import torch
from bench_sparsity import add_run_arguments, load_model
from torch import Tensor, nn

from cptq.calibration.batches import Batch, split_batches
from cptq.compression import COMPRESSORS
from cptq.compression.layer import compress_layer
from cptq.layouts.gguf import GGUF_LAYOUT, find_type
from cptq.types import Candidate

LABELS = (
    "w3g16-k",
    "w4g32",
    "w4g32-iq4nl",
    "w5g32",
    "w6g16-k",
    "w8g32",
    "w4g32-asym",
    "w5g32-asym",
)


@torch.no_grad()
def collect_moment(module: nn.Module, linear: nn.Module, batches: list[Batch]) -> Tensor:
    """Return E[x x^T] of a linear's inputs."""
    rows: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    for batch in split_batches(batches):
        module(**batch)
    handle.remove()
    X_TI = torch.cat(rows).double()
    return (X_TI.T @ X_TI / len(X_TI)).float()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", default=r"layers\.(5|15|25)\.mlp\.down_proj")
    add_run_arguments(parser)
    asked = parser.parse_args()
    inputs = load_model(asked)
    model, method = inputs.model, COMPRESSORS.get(asked.compressor)
    specs = [s for u in model.units for s in u.layers if re.search(asked.layers, s.name)]
    candidates = [Candidate.parse(label) for label in LABELS]
    fitting = [c for c in candidates if all(not GGUF_LAYOUT.explain_refusal(s, c) for s in specs)]
    errors: dict[Candidate, list[float]] = {c: [] for c in fitting}
    nbytes: dict[Candidate, int] = dict.fromkeys(fitting, 0)
    began = time.process_time()
    for spec in specs:
        linear = model.linear(spec.name)
        H_II, judge_II = (
            collect_moment(model.module, linear, batches)
            for batches in (inputs.calibration.batches, inputs.calibration.held_out)
        )
        W_OI = linear.weight.detach().float()
        for candidate in fitting:
            layer = compress_layer(
                spec,
                W_OI,
                H_II,
                candidate,
                method,
                GGUF_LAYOUT,
                held_out_II=judge_II,
                float16_scales=True,
            )
            assert layer.result.output_error is not None
            errors[candidate].append(layer.result.output_error)
            nbytes[candidate] += layer.result.nbytes
    weights = sum(spec.numel for spec in specs)
    print(f"{len(specs)} layers, {weights:,} weights, {inputs.calibration.tokens:,} tokens")
    for candidate in sorted(fitting, key=lambda c: nbytes[c]):
        mean = math.exp(sum(map(math.log, errors[candidate])) / len(specs))
        bits = 8 * nbytes[candidate] / weights
        size = f"{nbytes[candidate]:>10,} bytes {bits:7.4f} bits a weight"
        print(f"{find_type(candidate):6} {candidate.label:11} {size}  error {mean:.3e}")
    print(f"{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
