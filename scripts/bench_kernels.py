#!/usr/bin/env python3
"""Measure packed products beside float32 `F.linear`, interleaved, on weights that no cache holds.

Of each weight there are as many copies as fill COLD bytes, used in turn. Every round measures each
product once (and the read bandwidth: the sum of an array of COLD bytes); a figure is the median of
the rounds, a speed-up the median of the rounds' ratios, so that a busy machine slows both sides.
With one thread, times are its processor seconds.
With `--device cuda` the backend `triton` is measured beside bfloat16 `F.linear`: all copies of a
weight in one CUDA graph, so that no time of Python or the driver is in it; what a call costs there
is a table of its own.
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
from cptq.layouts.levels import LEVELS, NONLINEAR
from cptq.numerics.packing import count_words
from cptq.types import Candidate

#: bytes of all copies of a weight; more than a last-level cache, or the L2 cache of a GPU
COLD = {"cpu": 1 << 26, "cuda": 1 << 29}
#: seconds of one measurement, at least
SPAN = 0.02


#: stands for the dense product among (bits, levels)
DENSE = (16, "")


def draw_words(out: int, values: int, bits: int) -> Tensor:
    words = torch.randint(-(2**31), 2**31, (out, count_words(values, bits)), dtype=torch.int64)
    return words.to(torch.int32)


def make_weight(
    out: int, inputs: int, bits: int, group: int, row: bool, device: str, levels: str = ""
) -> PackedWeight:
    """A random symmetric weight with float16 scales, or 6-bit ones times a factor per row."""
    groups = inputs // group
    scale = (torch.rand(out, groups) * 0.01 + 0.001).half().to(device)
    return PackedWeight(
        scheme=Candidate(
            bits=bits,
            group_size=0 if group == inputs else group,
            scales="row" if row else "",
            levels=levels,
        ),
        shape=(out, inputs),
        codes=draw_words(out, inputs, bits).to(device),
        scale=draw_words(out, groups, 6).to(device) if row else scale,
        factor=scale[:, :1].contiguous() if row else None,
    )


def seconds(run: Callable[[], object], calls: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(calls):
        run()
    return (clock() - began) / calls


def seconds_on_gpu(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Of one of the `calls` that were captured, as the GPU's own clock has it."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def make_timer(run: Callable[[], object], copies: int, device: str) -> Callable[[], float]:
    """What measures the seconds of a call; `copies` calls use every copy of the weight once."""
    for _ in range(copies):
        run()  # a kernel is compiled by its first call, and kept with a weight
    if device == "cpu":
        calls = max(1, int(SPAN / max(1e-7, seconds(run, 2))))
        return lambda: seconds(run, calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            run()

    def time_graph(_: object = run) -> float:  # a graph does not keep the tensors that it reads
        return seconds_on_gpu(graph, copies)

    return time_graph


def copy_weight(weight: PackedWeight) -> PackedWeight:
    parts = {"codes": weight.codes, "scale": weight.scale, "factor": weight.factor}
    copies = {name: None if part is None else part.clone() for name, part in parts.items()}
    return PackedWeight(scheme=weight.scheme, shape=weight.shape, **copies)  # type: ignore[arg-type]


class Read:
    """Sums an array of int64: as fast as one thread, or a GPU, reads."""

    def __init__(self, device: str) -> None:
        self.array = torch.ones(COLD[device] // 8, dtype=torch.int64, device=device)

    def __call__(self) -> object:
        return self.array.sum()


def list_kinds(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Widths and levels, each width even and, if asked for, uneven."""
    tables = ["", NONLINEAR] if options.levels else [""]
    return [(b, kind) for b in options.bits for kind in tables if not kind or b in LEVELS[kind]]


def measure(
    out: int, inputs: int, tokens: int, options: argparse.Namespace
) -> dict[tuple[int, str], tuple[float, float]]:
    """{(bits, levels): (share of the bandwidth, speed-up)}."""
    group = options.group if inputs % options.group == 0 else inputs
    device, on_gpu = options.device, options.device == "cuda"
    backend = triton_backend if on_gpu else native_backend
    kind = {"device": device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    x = torch.randn(tokens, inputs, **kind)
    cold = COLD[device]
    copies = max(1, min(256, cold // (x.element_size() * out * inputs)))
    dense = cycle([torch.randn(out, inputs, **kind) for _ in range(copies)])
    with torch.inference_mode():
        timer = make_timer(lambda: functional.linear(x, next(dense)), copies, device)
        timers: dict[tuple[int, str], Callable[[], float]] = {DENSE: timer}
        nbytes = {}
        for bits, levels in list_kinds(options):
            weight = make_weight(out, inputs, bits, group, options.row, device, levels)
            nbytes[bits, levels] = weight.nbytes
            copies = max(2, min(2048, cold // weight.nbytes))
            turn = cycle([weight, *(copy_weight(weight) for _ in range(copies - 1))])
            run = lambda turn=turn: backend.linear(x, next(turn), None)  # noqa: E731
            timers[bits, levels] = make_timer(run, copies, device)
        read = make_timer(Read(device), 1, device)
        times: dict[tuple[int, str], list[float]] = {key: [] for key in timers}
        reads = []
        for _ in range(options.rounds):
            reads.append(read() / cold)
            for key, timer in timers.items():
                times[key].append(timer())
    return {
        kind: (
            statistics.median(
                nbytes[kind] * r / t for r, t in zip(reads, times[kind], strict=True)
            ),
            statistics.median(d / t for d, t in zip(times[DENSE], times[kind], strict=True)),
        )
        for kind in list_kinds(options)
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
    parser.add_argument("--levels", action="store_true", help="uneven levels as well")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exact", action="store_true", help="float32 activations")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the backend triton beside bfloat16 F.linear",
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
        for kind in list_kinds(options):
            share = f"{100 * found[1][kind][0]:.0f}%" if 1 in found else ""
            gains = [f"{found[n][kind][1]:.1f}" for n in options.tokens]
            name = f"{kind[0]} {kind[1]}".rstrip()
            print(f"| {' | '.join([shape, name, share, *gains])} |", flush=True)
    if options.device == "cuda":
        print_starts(options)


def print_starts(options: argparse.Namespace) -> None:
    """Microseconds that Python and the driver need for one call; the product itself is small."""
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    W_OI = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    weight = make_weight(256, 256, options.bits[0], 64, options.row, "cuda")
    calls: dict[str, Callable[[], object]] = {
        "F.linear": lambda: functional.linear(x, W_OI),
        "triton, 1 token": lambda: triton_backend.linear(x, weight, None),
    }
    print("\n| a call | us of the host |\n|---|---|")
    with torch.inference_mode():
        for name, run in calls.items():
            run()
            found = []
            for _ in range(options.rounds):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(200):
                    run()
                found.append((time.perf_counter() - began) / 200)
            print(f"| {name} | {1e6 * statistics.median(found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
