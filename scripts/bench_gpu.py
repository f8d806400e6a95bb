#!/usr/bin/env python3
"""Measure a packed model beside a bfloat16 one on a GPU, both in transformers' own `generate`.

Weights are random and made on the GPU: this is about speed and memory alone. Linears of the blocks
are packed, in groups of 64; embeddings and head stay as they are, in either model. Each figure is
the median of ROUNDS. Compilation is done before, and its seconds are told.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from make_random_checkpoint import SHAPES, build_config

from cptq.inference.modules import PackedLinear
from cptq.layouts.packed import list_packed_tensors
from cptq.types import Candidate

ROUNDS = 3


def build_model(shape: str, blocks: int | None) -> Any:
    """A model with random weights on the GPU, in bfloat16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(build_config(shape, blocks), dtype=torch.bfloat16)
    return model.eval()


def pack_linears(model: Any, bits: int) -> None:
    """Replace the linears of the blocks by packed ones with random codes of the same spread."""
    scheme = Candidate(bits=bits, group_size=64)
    head = model.get_output_embeddings()
    found = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    ]
    for name, dense in found:
        shape = dense.out_features, dense.in_features
        packed = PackedLinear(shape, scheme, bias=dense.bias is not None)
        for spec in list_packed_tensors("", shape, "BF16", scheme):
            if spec.dtype == "I32":
                high = torch.iinfo(torch.int32).max
                value = torch.randint(-high, high, spec.shape, dtype=torch.int32, device="cuda")
            else:
                size = float(dense.weight.detach().std()) / 2 ** (bits - 2)
                value = torch.full(spec.shape, size, dtype=torch.bfloat16, device="cuda")
            packed.register_parameter(spec.name[1:], nn.Parameter(value, requires_grad=False))
        packed.bias = dense.bias
        model.set_submodule(name, packed)
    gc.collect()
    torch.cuda.empty_cache()


def time_median(run: Callable[[], object]) -> float:
    run()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def time_decoding(model: Any, ids_1T: Tensor, tokens: int, **options: Any) -> float:
    """Seconds of a new token after the first."""

    def generate(count: int) -> None:
        model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    few, many = 8, 8 + tokens
    return (time_median(lambda: generate(many)) - time_median(lambda: generate(few))) / tokens


def measure(model: Any, options: argparse.Namespace) -> list[str]:
    """The cells of a row."""
    nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    ids_1T = torch.randint(0, model.config.vocab_size, (1, options.prompt), device="cuda")
    with torch.inference_mode():
        prompt = time_median(lambda: model(input_ids=ids_1T, logits_to_keep=1))
        step = time_decoding(model, ids_1T[:, :64], options.tokens)
        began = time.perf_counter()
        graph = time_decoding(model, ids_1T[:, :64], options.tokens, cache_implementation="static")
        compiling = time.perf_counter() - began
    return [
        f"{nbytes / 1e9:.2f}",
        f"{options.prompt / prompt:.0f}",
        f"{1 / step:.1f}",
        f"{1 / graph:.1f}",
        f"{compiling:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_gpu", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="so many blocks instead of all")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU: torch.cuda.is_available() is False")
    print(f"{torch.cuda.get_device_name()}, {options.shape}, random weights\n")
    titles = ["linears", "GB of weights", f"prompt of {options.prompt}, tokens/s"]
    titles += ["decoding, tokens/s", "in CUDA graphs, tokens/s", "s for these, with compiling"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for bits in (16, *options.bits):
        model = build_model(options.shape, options.blocks)
        if bits < 16:
            pack_linears(model, bits)
        print(f"| {' | '.join([f'{bits} bits', *measure(model, options)])} |", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


if __name__ == "__main__":
    main()
