#!/usr/bin/env python3
"""Whether leaving out columns pays for one token: the packed kernel against columns of 8 bits.

    scripts/bench_columns [--shape 2048x8192]

The packed kernel reads codes row by row, 32 inputs at a time, and cannot leave out single inputs. A
copy of the codes that stands input by input can: it reads those of the other inputs alone. Printed
are processor microseconds of one product of each, by the share of inputs that are 0 at random, with
weights colder than the cache; then the share of runs of 32 inputs that are 0 altogether, which is
what the packed kernel could leave out. The C source, bench_columns.c, is compiled by `cc`.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cptq.inference import operations
from cptq.inference.operations import PackedWeight
from cptq.numerics.packing import pack_rows, unpack_rows
from cptq.types import Candidate

SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 0.95)
#: bytes of weights that a turn goes through, more than a cache holds
COLD = 96 << 20
TURNS, GROUP, RUN = 5, 64, 32


def compile_library(folder: str) -> ctypes.CDLL:
    """Compile bench_columns.c and declare its function."""
    source, path = Path(__file__).with_suffix(".c"), Path(folder) / "columns.so"
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", path, source], check=True)
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.multiply_columns.argtypes = (
        *(pointer, pointer, number, pointer),
        number,
        number,
        pointer,
    )
    return library


def time_each(run: Callable[[int], object], copies: int) -> float:
    """Return processor microseconds of one call, the least of some turns through all copies."""
    taken = []
    for _ in range(TURNS):
        began = time.process_time()
        for k in range(copies):
            run(k)
        taken.append(time.process_time() - began)
    return min(taken) / copies * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048x8192", help="outputs x inputs")
    out, inputs = map(int, parser.parse_args().shape.split("x"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    copies = -(-COLD // (out * inputs // 2))
    weights = []
    for _ in range(copies):
        codes_OI = torch.randint(-8, 8, (out, inputs), dtype=torch.int8)
        scale_OG = (torch.rand(out, inputs // GROUP) + 0.5).half()
        scheme = Candidate(bits=4, group_size=GROUP)
        shape, codes = (out, inputs), pack_rows(codes_OI, 4)
        weights.append(PackedWeight(scheme=scheme, shape=shape, codes=codes, scale=scale_OG))
    columns = [unpack_rows(w.codes, 4, inputs).T.contiguous() for w in weights]
    scales = [w.scale.float().T.contiguous() for w in weights]
    y_O = torch.empty(out)
    print(f"{out} x {inputs}, one token, one thread, {copies} weights in turns")
    print(
        "| inputs that are 0 | packed, 4 bits, us | columns, 8 bits, us | runs of 32 that are 0 |"
    )
    print("|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(folder)
        for share in SHARES:
            x_I = torch.randn(inputs).masked_fill(torch.rand(inputs) < share, 0.0)

            def multiply(k: int, x_I: torch.Tensor = x_I) -> torch.Tensor:
                library.multiply_columns(
                    columns[k].data_ptr(),
                    scales[k].data_ptr(),
                    GROUP,
                    x_I.data_ptr(),
                    inputs,
                    out,
                    y_O.data_ptr(),
                )
                return y_O

            with operations.exact_products():
                expected_O = operations.linear(x_I, weights[0], None)
            torch.testing.assert_close(multiply(0), expected_O, rtol=1e-3, atol=1e-2)
            rows = time_each(lambda k, x_I=x_I: operations.linear(x_I, weights[k], None), copies)
            runs = float((x_I.view(-1, RUN) == 0).all(1).float().mean())
            took = time_each(multiply, copies)
            print(f"| {share:.0%} | {rows:.0f} | {took:.0f} | {runs:.1%} |", flush=True)


if __name__ == "__main__":
    main()
