#!/usr/bin/env python3
"""Measure packed products beside float32 `F.linear`, interleaved, on weights that no cache holds.

Of each weight there are as many copies as fill COLD bytes, used in turn. Every round measures each
product once (and the read bandwidth: the sum of an array of COLD bytes); a figure is the median of
the rounds, a speed-up the median of the rounds' ratios, so that a busy machine slows both sides.
With one thread, times are its processor seconds.
With `--device cuda` the backend `triton` is measured beside bfloat16 `F.linear`, in seconds that
include starting the kernels; this way was never run, for lack of a GPU.
Codes and scales are random: this is about speed alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from cptq.inference import operations, triton_backend
from cptq.inference.native import backend as native_backend
from cptq.inference.native.library import load_library
from cptq.inference.operations import PackedWeight
from cptq.numerics.packing import count_words
from cptq.types import Candidate

#: bytes of all copies of a weight; more than a last-level cache
COLD = 1 << 26
#: seconds of one measurement, at least
SPAN = 0.02


def draw_words(out: int, values: int, bits: int) -> Tensor:
    words = torch.randint(-(2**31), 2**31, (out, count_words(values, bits)), dtype=torch.int64)
    return words.to(torch.int32)


def make_weight(
    out: int, inputs: int, bits: int, group: int, row: bool, device: str
) -> PackedWeight:
    """A random symmetric weight with float16 scales, or 6-bit ones times a factor per row."""
    groups = inputs // group
    scale = (torch.rand(out, groups) * 0.01 + 0.001).half().to(device)
    return PackedWeight(
        scheme=Candidate(
            bits=bits, group_size=0 if group == inputs else group, scales="row" if row else ""
        ),
        shape=(out, inputs),
        codes=draw_words(out, inputs, bits).to(device),
        scale=draw_words(out, groups, 6).to(device) if row else scale,
        factor=scale[:, :1].contiguous() if row else None,
    )


def seconds(run: Callable[[], object], calls: int, device: str) -> float:
    on_gpu = device == "cuda"
    one = torch.get_num_threads() == 1 and not on_gpu
    clock = time.thread_time if one else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(calls):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - began) / calls


def count_calls(run: Callable[[], object], device: str) -> int:
    run()  # a kernel is compiled by its first call
    return max(1, int(SPAN / max(1e-7, seconds(run, 2, device))))


class Read:
    """Sums an array of int64: as fast as one thread, or a GPU, reads."""

    def __init__(self, device: str) -> None:
        self.array = torch.ones(COLD // 8, dtype=torch.int64, device=device)

    def __call__(self) -> object:
        return self.array.sum()


def measure(
    out: int, inputs: int, tokens: int, options: argparse.Namespace
) -> dict[int, tuple[float, float]]:
    """{bits: (share of the bandwidth, speed-up)}."""
    group = options.group if inputs % options.group == 0 else inputs
    device, on_gpu = options.device, options.device == "cuda"
    backend = triton_backend if on_gpu else native_backend
    kind = {"device": device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    x = torch.randn(tokens, inputs, **kind)
    copies = max(1, min(256, COLD // (x.element_size() * out * inputs)))
    dense = cycle([torch.randn(out, inputs, **kind) for _ in range(copies)])
    runs: dict[int, Callable[[], object]] = {0: lambda: functional.linear(x, next(dense))}
    nbytes = {}
    for bits in options.bits:
        shape = out, inputs, bits, group, options.row, device
        weight = make_weight(*shape)
        nbytes[bits] = weight.nbytes
        number = max(2, min(2048, COLD // weight.nbytes))
        turn = cycle([make_weight(*shape) for _ in range(number)])
        runs[bits] = lambda turn=turn: backend.linear(x, next(turn), None)
    read = Read(device)
    calls = {key: count_calls(run, device) for key, run in runs.items()}
    times: dict[int, list[float]] = {key: [] for key in runs}
    reads = []
    with torch.inference_mode():
        for _ in range(options.rounds):
            reads.append(seconds(read, 1, device) / COLD)
            for key, run in runs.items():
                times[key].append(seconds(run, calls[key], device))
    return {
        bits: (
            statistics.median(
                nbytes[bits] * r / t for r, t in zip(reads, times[bits], strict=True)
            ),
            statistics.median(d / t for d, t in zip(times[0], times[bits], strict=True)),
        )
        for bits in options.bits
    }


def describe(options: argparse.Namespace) -> str:
    """What computes, and how it takes activations."""
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16 activations"
    features = load_library().cptq_cpu_features().decode()
    mode = "float32" if options.exact else "8-bit"
    return f"{features}, {options.threads} threads, {mode} activations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--shape", nargs="+", default=["2048x8192", "576x1536"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--row", action="store_true", help="scales of 6 bits and factors per row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exact", action="store_true", help="float32 activations")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the backend triton beside bfloat16 F.linear (untested: written without a GPU)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    operations.set_exact(options.exact)
    scales = "row" if options.row else "float16"
    print(f"{describe(options)}, groups of {options.group} with {scales} scales\n")
    titles = ["shape", "bits", "share of bandwidth, 1 token"]
    print(f"| {' | '.join(titles + [f'x, {n} tokens' for n in options.tokens])} |")
    print("|" + "---|" * (len(titles) + len(options.tokens)))
    for shape in options.shape:
        out, inputs = map(int, shape.split("x"))
        found = {n: measure(out, inputs, n, options) for n in options.tokens}
        for bits in options.bits:
            share = f"{100 * found[1][bits][0]:.0f}%" if 1 in found else ""
            gains = [f"{found[n][bits][1]:.1f}" for n in options.tokens]
            print(f"| {' | '.join([shape, str(bits), share, *gains])} |", flush=True)


if __name__ == "__main__":
    main()
